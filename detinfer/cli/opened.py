"""A golden and the model it was recorded from, opened for a verb that replays it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from detinfer.cli import options, ranks

if TYPE_CHECKING:
    from detinfer.goldens.format import Golden
    from detinfer.goldens.runner import Request
    from detinfer.models.ranks import Ranks
    from detinfer.policy import Policy
    from detinfer.policy.policy import Reductions


@dataclass(frozen=True)
class Opened:
    """The golden, its model, the recorded requests, the policy, and the ranks that hold the model."""

    golden: Golden
    target: Any
    requests: Sequence[Request]
    policy: Policy
    ranks: Ranks


@contextmanager
def opened(
    context: click.Context,
    golden: Path,
    console: Console,
    *,
    spec: str | None,
    device: str | None,
    tp: int | None,
    reductions: Reductions | None,
    alone: bool = False,
    rank_timeout: float | None = None,
) -> Iterator[Opened]:
    """Read the golden, load the model (from ``spec``, else where it was recorded) and check that they belong together.

    The policy is the golden's, with other ``reductions`` where they are given. ``alone`` loads the whole model here, also
    where a launcher started this process as a rank.
    """
    from detinfer.goldens.format import Golden
    from detinfer.goldens.inputs import check_target, requests_of
    from detinfer.goldens.prepare import policy_of, prepare_again
    from detinfer.models import targets

    with ExitStack() as stack:
        with console.status("reading the golden") as status:
            held = Golden.read(golden)
            size = 1 if alone else ranks.size(tp, held.manifest.ranks)
            recorded = held.manifest.target
            where = targets.checked(device or ("cuda" if held.manifest.environment.get("gpu") else "cpu"))
            if alone and where.type == "cuda" and "LOCAL_RANK" in os.environ:
                where = targets.checked(f"cuda:{os.environ['LOCAL_RANK']}")
                torch.cuda.set_device(where)
            targets.check_ranks(spec or recorded["spec"], size)
            status.stop()
            ranks.start(context, size)
            status.start()
            everyone = stack.enter_context(ranks.joined(size, rank_timeout))
            status.update("loading the model")
            dtype = options.dtype(recorded["dtype"])
            policy = policy_of(held)
            policy = replace(policy, reductions=reductions or policy.reductions)
            seed = held.manifest.inputs["seed"]
            target = targets.load(spec or recorded["spec"], dtype, seed, everyone, where, policy.reductions, policy)
            if size != held.manifest.ranks:
                target = targets.as_on(target, held.manifest.ranks, seed, policy.reductions)
            check_target(held, target, policy)
            requests = requests_of(held, target, prepare_again(target))
        yield Opened(held, target, requests, policy, everyone)
