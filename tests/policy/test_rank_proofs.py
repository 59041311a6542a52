"""Proofs of collectives can fail: a path with another order, another rounding or another start is found out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from detinfer.collectives.ordered_gather import reduce_gathered
from detinfer.errors import Diverged
from detinfer.policy.rank_proofs import compare, gathered, inputs, tensor

Parts = Sequence[torch.Tensor]


def rotated(first: int) -> Callable[[Parts], torch.Tensor]:
    """The sum from another rank on."""
    return lambda parts: reduce_gathered([*parts[first:], *parts[:first]], "sum")


def stepwise(parts: Parts) -> torch.Tensor:
    """Rounded to the dtype after each step, as rings and trees do."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def from_zero(parts: Parts) -> torch.Tensor:
    """Starts at +0, which loses -0."""
    return reduce_gathered([torch.zeros_like(parts[0]), *parts], "sum")


WRONG: dict[str, tuple[Any, tuple[torch.dtype, ...]]] = {
    "rotated by 1": (rotated(1), (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    "rotated by 2": (rotated(2), (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    "stepwise": (stepwise, (torch.bfloat16, torch.float16)),
    "from zero": (from_zero, (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_orders_fail_the_proof(name: str) -> None:
    """At three ranks and more, in every dtype for which the mistake is one."""
    function, dtypes = WRONG[name]
    for dtype in dtypes:
        for size in (3, 4, 8):
            parts = [tensor(part, dtype) for part in inputs("all_reduce", "sum", dtype, size)[0]]
            with pytest.raises(Diverged, match="is not the reference"):
                compare(lambda own, way, p=parts: function(p), (None,), ("all_reduce", "sum", dtype), 0, size)  # type: ignore[misc]


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERY = [(op, dtype) for op in ("sum", "avg", "max", "min") for dtype in FLOATS]
EVERY += [(op, dtype) for op in ("sum", "max", "min") for dtype in (torch.int32, torch.uint8)]


@pytest.mark.parametrize(("op", "dtype"), EVERY)
def test_ordered_gather(op: str, dtype: torch.dtype) -> None:
    """The ordered sum of gathered parts is the reference, at every size and on every rank."""
    for size in (1, 2, 3, 5, 8):
        for collective in ("all_reduce", "reduce_scatter"):
            parts = [tensor(part, dtype) for part in inputs(collective, op, dtype, size)[0]]  # type: ignore[arg-type]
            for rank in range(size):
                run = lambda own, way, p=parts, c=collective, r=rank: gathered(c, op, p, r)  # noqa: E731
                proof = compare(run, (None,), (collective, op, dtype), rank, size)  # type: ignore[arg-type]
                assert proof.cases >= size * 67 // (size if collective == "reduce_scatter" else 1)


def test_torch_maximum_is_not_the_contract() -> None:
    """It keeps NaN's payload and either zero: the proof's inputs hold both."""
    dtype = torch.float32
    parts = [tensor(part, dtype) for part in inputs("all_reduce", "max", dtype, 3)[0]]

    def run(own: torch.Tensor, way: str | None) -> torch.Tensor:
        return torch.maximum(torch.maximum(parts[0], parts[1]), parts[2])

    with pytest.raises(Diverged):
        compare(run, (None,), ("all_reduce", "max", dtype), 0, 3)
