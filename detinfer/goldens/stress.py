"""Show that the sweep could have failed: stress inputs at the recorded shapes, with a planted wrong order.

On a real model's bf16 rows a wrong order is nearly invisible: an fp32 accumulator of bf16 values mostly rounds to the
same bits in any order. So every reducing operation that ran is also called on inputs with cancellation and a spread
of exponents, alone and in a batch, twice: as it is (rows must agree) and with its operands in another order along the
reduction whenever the batch exceeds 1 (rows must differ: the planted fault). The plant changes operands, never the
comparer, and no faulty kernel exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from detinfer.goldens.compare import compare
from detinfer.goldens.result import Sensitivity
from detinfer.goldens.tree import Node

BATCH = 5
"""Rows of a stress batch: odd, so that a last partial tile exists."""

AT_ONCE = 33
"""Terms from which on a GPU the planted order moves one between steps of the matrix unit, which adds 16 products at once,
in no order: the plant would not show in a sum of fewer."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Stress:
    """One reducing operation on stress inputs.

    ``run(arguments)`` calls it; ``make(rows)`` gives the arguments of the batch rows in ``rows``; ``plant`` puts its
    operands into another order along the reduction; ``restore`` puts the output back where it has that dimension too.
    ``length`` is the number of terms of a sum, ``product`` whether they are products that a matrix unit takes.
    """

    run: Callable[[tuple[Any, ...], dict[str, Any]], torch.Tensor]
    make: Callable[[Sequence[int]], Arguments]
    plant: Callable[[Arguments], Arguments]
    restore: Callable[[torch.Tensor], torch.Tensor]
    length: int
    shape: str
    product: bool = False


def numbers(rng: np.random.Generator, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Values of both signs with magnitudes spread over 2^-2 to 2^3, from an integer generator."""
    mantissa = rng.integers(128, 256, size=tuple(shape)).astype(np.float64) / 128
    exponent = rng.integers(-2, 3, size=tuple(shape))
    sign = rng.integers(0, 2, size=tuple(shape)) * 2 - 1
    return torch.from_numpy(np.ldexp(mantissa * sign, exponent)).to(dtype)


def cancelling(rng: np.random.Generator, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Small terms between a large first one and its negative at the end of the last dimension: the sum cancels.

    The large term is about 2^14 and the others 2^-9 to 2^-4: next to it, fp32 keeps hardly a bit of them, and which
    it keeps depends on the order. What is left after the cancellation is small, so bf16 and fp16 show it.
    """
    values = numbers(rng, shape, dtype) / 128
    if shape[-1] > 2:
        large = 2.0**14 * (1 + rng.integers(0, 128, size=tuple(shape[:-1])).astype(np.float64) / 256)
        values[..., 0] = torch.from_numpy(large).to(dtype)
        values[..., -1] = -values[..., 0]
    return values


def disorder(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The planted order: every second term from the second on, then the others.

    A plain reversal would not do: it maps the halving of lanes onto itself when their number is a power of two. Nor
    would an order that leaves the first term in front: beside a large term every small one is rounded to the same
    grid, whenever it comes.
    """
    return tensor.index_select(dim, _riffle(tensor.shape[dim]).to(tensor.device))


def restored(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Undo ``disorder``: for outputs that have a place for every term."""
    return tensor.index_select(dim, _riffle(tensor.shape[dim]).argsort().to(tensor.device))


def _riffle(length: int) -> torch.Tensor:
    return torch.tensor([*range(1, length, 2), *range(0, length, 2)])


def probe(
    stress: Stress,
    operation: str,
    dtype: torch.dtype,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Sensitivity:
    """Judge one operation on ``device``: are its rows batch-invariant on stress inputs, and is the planted fault seen?"""
    everyone = list(range(BATCH))

    def make(rows: Sequence[int]) -> Arguments:
        args, kwargs = stress.make(rows)
        return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args), kwargs

    expected: Node = {"tensor": torch.cat([stress.run(*make([i])) for i in everyone], 0)}
    together: Node = {"tensor": stress.run(*make(everyone))}
    honest = compare(together, expected)
    least = AT_ONCE if stress.product and device.type == "cuda" and dtype.itemsize == 2 else 3
    if stress.length < least:
        return _sensitivity(
            stress, operation, dtype, None, honest.differing == 0, honest.compared, f"fewer than {least} terms"
        )
    planted: Node = {"tensor": stress.restore(stress.run(*stress.plant(make(everyone))))}
    seen = compare(planted, expected).differing > 0
    return _sensitivity(stress, operation, dtype, seen, honest.differing == 0, honest.compared, "")


def _sensitivity(
    stress: Stress, operation: str, dtype: torch.dtype, seen: bool | None, invariant: bool, rows: int, note: str
) -> Sensitivity:
    name = str(dtype).removeprefix("torch.")
    return Sensitivity(operation, name, stress.shape, seen, invariant, rows, note)
