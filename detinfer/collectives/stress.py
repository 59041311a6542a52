"""Ranks' tensors on which a wrong order over ranks shows.

Random values of a 16-bit dtype hide it: their sum in fp32 mostly rounds to the same bits in any order.
"""

from __future__ import annotations

import numpy as np

from detinfer.reference.all_reduce import Values
from detinfer.reference.arithmetic import DType, store


def cancelling(ranks: int, n: int, dtype: DType, seed: int = 0) -> list[Values]:
    """Each rank's n elements, as stored bits: rank 0 about 2^15, the last rank its negative or nearly so, terms of
    2^-20 to 2^-1 on the ranks between.

    Beside the large term fp32 keeps a few bits of a small one, and which it keeps depends on the order; what is left in
    the end is small, so that even bfloat16 shows it. Every eighth element is -0 on all ranks, which a sum that starts
    at +0 loses.
    """
    random = np.random.default_rng([seed, ranks, n])
    parts = []
    for _ in range(ranks):
        mantissa = random.integers(2**22, 2**23, n) * random.choice(np.array([-1, 1]), n)
        parts.append(np.ldexp(mantissa.astype(np.float64), random.integers(-43, -23, n)))
    large = np.ldexp(random.integers(128, 256, n).astype(np.float64), 8)
    parts[0] = large if ranks > 2 else parts[0] + large
    parts[-1] = -large * np.where(random.integers(0, 2, n) == 1, 1.0, 1.0 + 2.0**-12)
    for part in parts:
        part[5::8] = -0.0
    return [store(part.astype(np.float32), dtype) for part in parts]


def special(ranks: int, dtype: DType) -> list[Values]:
    """Each rank's elements, as stored bits: NaN of several payloads and signs, infinities of one and both signs, both
    zeros, subnormals, and the greatest finite values, in all pairs of them on the first two ranks.
    """
    width, most, quiet = (32, 0x7F7FFFFF, 0x7F800000) if dtype == "float32" else (16, 0, 0)
    if dtype == "bfloat16":
        most, quiet = 0x7F7F, 0x7F80
    elif dtype == "float16":
        most, quiet = 0x7BFF, 0x7C00
    sign = 1 << (width - 1)
    one = [0, quiet, quiet | 1, quiet | (quiet >> 1) & ~quiet | 3, 1, most, most - 5, quiet >> 1 & quiet]
    every = np.array([*one, *(value | sign for value in one)], np.uint32 if width == 32 else np.uint16)
    first, second = np.repeat(every, len(every)), np.tile(every, len(every))
    return [(first, second)[r] if r < 2 else np.roll(every, r).repeat(len(every)) for r in range(ranks)]
