"""Assertions on bits for any test framework: the same bytes, and the same bytes whatever stands beside a row.

    assert_bits_equal(model(x), expected)
    assert_batch_invariant(model, x)

Both raise AssertionError with the first element that differs. torch is imported when one is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from detinfer.errors import UsageError

if TYPE_CHECKING:
    import torch

    from detinfer.policy import Policy

__all__ = ["assert_batch_invariant", "assert_bits_equal"]

TRIALS = 8
"""Batches that ``assert_batch_invariant`` forms unless told otherwise."""


def assert_bits_equal(got: Any, expected: Any, where: str = "") -> None:
    """The same bytes, dtype and shape; of tensors, and of lists, tuples and dicts of them, one by one.

    -0.0 is not +0.0, and NaN is NaN where its bits are the same. Raises AssertionError naming the place of the first
    difference: index, both values, both bit patterns and the distance in ULP; UsageError for what holds no tensors.
    """
    import torch

    from detinfer import bits

    name = where or "result"
    if isinstance(expected, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            raise AssertionError(f"{name}: {type(got).__name__}, and a tensor is expected")
        if (got.dtype, got.shape) != (expected.dtype, expected.shape):
            raise AssertionError(
                f"{name}: {bits.dtype_name(got.dtype)} {list(got.shape)}, expected {bits.dtype_name(expected.dtype)} "
                f"{list(expected.shape)}"
            )
        if (found := bits.first_mismatch(got, expected)) is not None:
            raise AssertionError(
                f"{name}: {bits.count_mismatches(got, expected)} of {got.numel()} elements differ; {found}"
            )
        return
    if isinstance(expected, dict) and isinstance(got, dict):
        if got.keys() != expected.keys():
            raise AssertionError(f"{name}: keys {sorted(map(str, got))}, expected {sorted(map(str, expected))}")
        for key, value in expected.items():
            assert_bits_equal(got[key], value, f"{where}[{key!r}]")
        return
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        if len(got) != len(expected):
            raise AssertionError(f"{name}: {len(got)} results, expected {len(expected)}")
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_bits_equal(one, other, f"{where}[{index}]")
        return
    if isinstance(expected, dict | list | tuple):
        raise AssertionError(f"{name}: {type(got).__name__}, expected {type(expected).__name__}")
    raise UsageError(f"assert_bits_equal: {name} is {type(expected).__name__}; give tensors, or lists or dicts of them")


def assert_batch_invariant(
    fn: Callable[[torch.Tensor], Any],
    x: torch.Tensor,
    dim: int = 0,
    *,
    n_trials: int = TRIALS,
    policy: Policy | str | None = None,
    seed: int = 0,
) -> None:
    """Each row of ``x`` along ``dim`` gives ``fn`` the same bytes alone and in every batch of rows of ``x``.

    ``fn`` takes a tensor with any number of rows along ``dim`` and gives one tensor with as many along ``dim``. Rows are
    put into ``n_trials`` batches of 2 to 2 x rows, at random positions, repeated rows among them. With ``policy`` (one, or
    a scope) all of it runs under that. Raises AssertionError naming the row, the trial and the batch's size; UsageError
    for fewer than two rows, which cannot show anything, and for a result without the rows.
    """
    from contextlib import nullcontext

    from detinfer.policy import deterministic

    rows = x.shape[dim] if x.dim() else 0
    if rows < 2 or n_trials < 1:
        raise UsageError(
            f"assert_batch_invariant: {rows} rows, {n_trials} trials: at least 2 different rows and a trial"
        )
    with deterministic(policy) if policy is not None else nullcontext():  # type: ignore[arg-type]
        _sweep(fn, x, dim, _batches(rows, n_trials, seed))


def _batches(rows: int, trials: int, seed: int) -> list[list[int]]:
    import random

    # Not numpy's or torch's: a test's own seeds stay as they are.
    draw = random.Random(seed)
    found = [list(range(rows))]  # all of them as they come, then others
    while len(found) < trials:
        size = draw.randint(2, 2 * rows)
        found.append([draw.randrange(rows) for _ in range(size)])
    return found


def _sweep(fn: Callable[[torch.Tensor], Any], x: torch.Tensor, dim: int, batches: Sequence[Sequence[int]]) -> None:
    import torch

    from detinfer import bits

    def call(rows: Sequence[int]) -> torch.Tensor:
        result = fn(x.index_select(dim, torch.tensor(rows, device=x.device)))
        if not isinstance(result, torch.Tensor) or result.dim() == 0 or result.shape[dim] != len(rows):
            what = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise UsageError(f"assert_batch_invariant: of {len(rows)} rows the function gives {what}: no row for each")
        return result.detach()

    alone = [call([row]) for row in range(x.shape[dim])]
    if len({bits.digest(one) for one in alone}) == 1:
        raise UsageError(
            "assert_batch_invariant: every row gives the same bytes, so nothing can show: give rows that differ"
        )
    for trial, batch in enumerate(batches):
        together = call(batch)
        for place, row in enumerate(batch):
            where = f"row {row} at place {place} of a batch of {len(batch)} (trial {trial}), against the same row alone"
            assert_bits_equal(together.narrow(dim, place, 1).contiguous(), alone[row].contiguous(), where)
