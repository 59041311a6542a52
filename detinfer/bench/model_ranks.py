"""A whole model cut over GPUs by transformers' own plan: the policy's cost, and whether rows keep their bytes there.

Both sides run the same shares of one model, in turn; torch's side adds over ranks by NCCL. Times are the slowest rank's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from detinfer.bench import model_cuda
from detinfer.models import random_weights, targets, tensor_parallel
from detinfer.models.ranks import Ranks


@dataclass(frozen=True)
class Found:
    """What all ranks found: shapes proved, the seconds that took, times and comparisons."""

    shapes: int
    seconds: float
    timings: list[model_cuda.Timing]
    checks: list[model_cuda.Check]


def run(name: str, ranks: Ranks, repeats: int = 7, said: Callable[[str], None] = lambda _: None) -> Found:
    """Cut ``random:NAME`` over ``ranks``, prove its layers, compare rows and time both sides; all ranks call it together.

    Raises TargetError where there are fewer GPUs than ranks or the model cannot be cut so. NVLink multicast stays off on both
    sides unless ``NCCL_NVLS_ENABLE`` says otherwise.
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    where = targets.of_rank(f"random:{name}", torch.device("cuda"), ranks)
    torch.cuda.set_device(where)
    said("cutting the model")
    shares = tensor_parallel.cut(
        f"random:{name}", lambda: random_weights.load(name, torch.bfloat16, 0, where), torch.bfloat16, ranks, where
    )
    said("proving its linear layers")
    model = shares.module.eval().requires_grad_(False)
    shapes, seconds = model_cuda.prove(model)
    said("comparing rows")
    checks = list(model_cuda.checks(model))

    def together(step: model_cuda.Step) -> tuple[float, float]:
        ranks.share(None)
        found = ranks.share(step())
        return max(device for device, _ in found), max(host for _, host in found)

    timings = list(model_cuda.run(model, repeats=repeats, said=said, together=together))
    return Found(shapes, max(ranks.share(seconds)), timings, worst(checks, ranks))


def worst(checks: list[model_cuda.Check], ranks: Ranks) -> list[model_cuda.Check]:
    """Each comparison with the most rows that differ on any rank, the policy on and off; all ranks call it together."""
    every = ranks.share([(check.differ, check.differ_without) for check in checks])
    return [
        replace(check, differ=max(rank[i][0] for rank in every), differ_without=max(rank[i][1] for rank in every))
        for i, check in enumerate(checks)
    ]
