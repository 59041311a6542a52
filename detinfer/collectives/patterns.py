"""Inputs on which a wrong order, a wrong rounding and a lost sign of zero show, from an integer generator.

Every function gives one stored array (uint32 or uint16 bits) for each of N ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detinfer.reference.arithmetic import Bits, DType, Float, load, store

DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")


def small(rng: np.random.Generator, shape: Sequence[int]) -> Float:
    """Values of both signs, magnitudes 2^-9 to 2^-3, eight bits each."""
    mantissa = rng.integers(128, 256, size=tuple(shape)) / 128.0
    signed = mantissa * (rng.integers(0, 2, size=tuple(shape)) * 2 - 1)
    return np.ldexp(signed, rng.integers(-9, -3, size=tuple(shape))).astype(np.float32)


def cancellation(rng: np.random.Generator, ranks: int, shape: Sequence[int], dtype: DType) -> list[Bits]:
    """Rank 0 holds a power of two, the last rank its negative, those between small values.

    Above a power of two fp32's grid is twice as wide as below it. In rank order small terms are added above (or, for a
    negative large term, below), in a rotated order on the other side, so about half of the elements differ; beside other
    large values the two would round alike. What is left is small, so that 16 bits show it.
    """
    sign = rng.integers(0, 2, size=tuple(shape)) * 2.0 - 1
    large = np.ldexp(sign, rng.integers(12, 15, size=tuple(shape))).astype(np.float32)
    parts = [large, *(small(rng, shape) for _ in range(ranks - 2)), -large]
    if ranks == 2:
        parts[1] = (parts[1] * np.float32(0.9921875)).astype(np.float32)
    return [store(part, dtype) for part in parts]


def spread(rng: np.random.Generator, ranks: int, shape: Sequence[int], dtype: DType) -> list[Bits]:
    """Any finite bits: exponents from the least subnormal to the greatest number, so that sums overflow as well."""
    width = 32 if dtype == "float32" else 16
    exponent = {"float32": 8, "bfloat16": 8, "float16": 5}[dtype]
    fraction = width - 1 - exponent
    kind = np.uint32 if width == 32 else np.uint16
    parts = []
    for _ in range(ranks):
        power = rng.integers(0, 2**exponent - 1, size=tuple(shape))
        rest = rng.integers(0, 2**fraction, size=tuple(shape))
        parts.append((rng.integers(0, 2, size=tuple(shape)) << (width - 1) | power << fraction | rest).astype(kind))
    return parts


def zeros(ranks: int, dtype: DType) -> list[Bits]:
    """Every way to give the ranks zeros of either sign: 2^ranks elements less one, the last all -0."""
    pattern = np.arange(1, 2**ranks)
    signs = [pattern >> rank & 1 for rank in range(ranks)]
    return [store(np.where(sign == 1, np.float32(-0.0), np.float32(0.0)), dtype) for sign in signs]


def special(rng: np.random.Generator, ranks: int, shape: Sequence[int], dtype: DType) -> list[Bits]:
    """NaN of several bits, infinities, zeros, ones, the least and greatest numbers, on any rank."""
    infinity = int(store(np.array([np.inf], np.float32), dtype)[0])
    bits = [0, 1, 2, infinity, infinity - 1, infinity + 1, {"float32": 0x7FC01234}.get(dtype, infinity + 3)]
    bits += [int(b) for b in store(np.array([1, 0.5, 3], np.float32), dtype)]
    kind = np.uint32 if dtype == "float32" else np.uint16
    sign = 1 << (31 if dtype == "float32" else 15)
    table = np.array([*bits, *(b | sign for b in bits)], kind)
    return [table[rng.integers(0, len(table), size=tuple(shape))] for _ in range(ranks)]


def stored_each_step(parts: Sequence[Bits], dtype: DType) -> Bits:
    """A wrong sum: rounded to the dtype after every addition."""
    total = parts[0]
    with np.errstate(all="ignore"):
        for part in parts[1:]:
            total = store(load(total, dtype) + load(part, dtype), dtype)
    return total
