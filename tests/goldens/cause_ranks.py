"""What a rank does in test_cause_ranks.py: faults are planted one after another, and their causes searched for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))

Fault = tuple[str, str, tuple[int, ...], str, str]
"""What and where (``odd_batch.planted``), on which ranks, along which axis, under which policy (``off``: none)."""


def run(spec: str, faults: Sequence[Fault]) -> list[Any]:
    """The cause of each fault, and of a fault that was taken out again: None."""
    import torch.distributed as dist
    from odd_batch import LENGTH, planted

    from detinfer import deterministic
    from detinfer.collectives.launch import join, place
    from detinfer.goldens.cause.find import find
    from detinfer.goldens.result import Divergence
    from detinfer.goldens.runner import Request, run_language_model
    from detinfer.goldens.sweep import Trial
    from detinfer.models import targets
    from detinfer.models.ranks import Spread

    mine = place()
    assert mine is not None
    found: list[Any] = []
    with join(mine, 300) as communicator:
        ranks = Spread(communicator)
        target = targets.load(spec, torch.float32, ranks=ranks)
        requests, rows = [], torch.randint(90, (3, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
        with deterministic("batch"):
            for row in rows:
                _, tokens = run_language_model(target, [Request(tuple(row), steps=3)], lambda _: nullcontext())
                requests.append(Request(tuple(row), tokens[0], steps=3))
        trial = Trial(0, (2, 0, 1), (0,))
        for what, path, on, axis, policy in faults:
            first = Divergence(
                "",
                "model",
                "",
                "prefill",
                0,
                0,
                "",
                (3,),
                0,
                "",
                "",
                None,
                1,
                1,
                trial=0,
                batch=3,
                position=1,
                axis=axis,
            )
            with deterministic(policy) if policy != "off" else torch.no_grad():
                for around in (planted(target.module, what, path, ranks.rank in on), nullcontext()):
                    with around:
                        located = find(target, requests, [], [trial], first, 0, ranks)
                    found.append((located and located.cause, located is not None and located.operations is not None))
                    if policy == "off":  # torch's own kernels see the batch with no fault at all
                        break
        if dist.is_initialized():
            dist.destroy_process_group()
    return found
