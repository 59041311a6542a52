"""Options that more than one verb has."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from detinfer.errors import UnsupportedDtype
from detinfer.policy import Policy
from detinfer.policy.configured import configured


class GoldenPath(click.ParamType):  # type: ignore[type-arg]
    """A golden's folder: a path, or the URL of a remote one, which is copied into the user's cache."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        from detinfer.goldens import remote

        return remote.cached(value) if remote.is_remote(value) else Path(value)


golden_path = GoldenPath()

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a ``--dtype`` value."""
    if name is None:
        return None
    if name not in DTYPES:
        raise UnsupportedDtype(f"--dtype {name}: one of {', '.join(DTYPES)}")
    return DTYPES[name]


def policy(
    scope: str | None, allow: tuple[str, ...], reductions: str | None = None, groups: int | None = None
) -> Policy:
    """The policy of ``--policy``, ``--allow``, ``--reductions`` and ``--groups``; the rest is the project's."""
    found = configured(scope=scope, allow=allow or None, reductions=reductions)[0]
    return found if groups is None else replace(found, groups=groups)


def command_line(drop: tuple[str, ...], flags: tuple[str, ...] = ()) -> str:
    """This process's command line without the options in ``drop``, their values, and ``flags``: for the manifest."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in drop:
            next(words, None)
        elif word not in flags and not word.startswith(tuple(f"{option}=" for option in drop)):
            kept.append(word)
    return shlex.join(["detinfer", *kept])


policy_option = click.option(
    "--policy",
    "scope",
    metavar="SCOPE",
    help="Scope of the policy: run, batch or tp [default: the project's, else batch].",
)
allow_option = click.option(
    "--allow",
    multiple=True,
    metavar="OP",
    help="Let aten::name.overload run on torch's own path, unproved. Repeatable.",
)
reductions_option = click.option(
    "--reductions",
    type=click.Choice(["merged", "separate"]),
    help="Sums over ranks of a mixture-of-experts layer: one for all, or one each [default: merged, or as recorded].",
)
groups_option = click.option(
    "--groups",
    type=click.IntRange(min=1),
    metavar="N",
    help="Scope tp: groups of a row-parallel layer's inputs [default: the largest power of two up to 8 that divides them].",
)
tp_option = click.option(
    "--tp", type=int, metavar="N", help="Ranks to cut the model over, started here [default: 1, or torchrun's]."
)
timeout_option = click.option(
    "--rank-timeout",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="How long a rank waits for another before it says so and all end [default: 600].",
)
device_option = click.option(
    "--device", metavar="DEVICE", help="Where the model runs: cpu or cuda [default: cpu, or where it was recorded]."
)
layers_option = click.option("--layers", metavar="REGEX", help="Only units whose name matches.")
