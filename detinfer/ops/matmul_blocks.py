"""Shapes of block of the fast kernels on a GPU: which suits a product where nothing was measured, which a proof times.

A block computes ``rows`` rows of x times ``columns`` columns of the result over all of k, which cannot be cut: so a
product takes as long as the processors need to go through its blocks in waves. What a wave takes was measured for each
shape of block; counting waves tells the shapes of a product apart. No choice here changes a bit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Block(NamedTuple):
    """A shape of block and what waves of it take, in microseconds for 4096 of k.

    ``alone``: the one wave of a product that has at most one block for each processor. ``full``: a wave in which
    processors hold several, up to ``held``. ``last``: at most one block for each processor, after full waves; small
    blocks end so close together that processors take the last ones in pairs, which is as slow as a full wave.
    """

    rows: int
    columns: int
    held: int
    alone: float
    last: float
    full: float


BLOCKS = (
    Block(1, 32, 2, 23, 24, 24), Block(2, 32, 2, 25, 25, 25), Block(4, 32, 2, 30, 30, 30), Block(8, 32, 2, 39, 39, 39),
    Block(16, 32, 2, 54, 54, 54), Block(16, 16, 2, 37, 37, 37), Block(16, 24, 2, 48, 48, 48),
    Block(32, 32, 2, 87, 87, 87), Block(32, 24, 2, 71, 71, 71), Block(64, 32, 2, 83, 138, 138),
    Block(64, 40, 2, 104, 163, 163), Block(64, 64, 3, 229, 325, 325), Block(128, 40, 2, 285, 285, 285),
    Block(128, 128, 1, 403, 403, 403),
    Block(4, 8, 2, 12, 12, 12), Block(4, 32, 2, 20, 21, 21), Block(16, 24, 2, 24, 45, 45),
    Block(32, 24, 2, 26.5, 50, 50), Block(32, 32, 2, 34, 62, 62), Block(32, 40, 2, 41, 75, 75),
    Block(32, 64, 2, 59, 59, 108), Block(64, 40, 2, 72, 65, 135), Block(64, 64, 2, 109, 151, 204),
    Block(64, 80, 2, 127, 122, 242),
    Block(128, 64, 1, 323, 323, 323), Block(128, 80, 1, 254, 254, 254), Block(128, 128, 1, 383, 383, 383),
    Block(128, 160, 1, 475, 475, 475),
)  # fmt: skip
"""csrc's variants of ``stream`` by number. Times are rounded from the medians of four layers at 15 numbers of rows,
on one H200, torch 2.11.0 (CUDA 13.0), 2026-11-23; where reading the weight hides the waves, the least. Where one of the
first 14 was not the fastest of those with so few blocks, the time of its fuller waves stands for the lesser one."""

SKINNY = Block(64, 64, 1, 22.5, 22.5, 22.5)
"""bf16 and fp16 with more rows than 64: csrc's block of ``skinny``, which takes up to SKINNY_ROWS."""

WIDE = (Block(128, 128, 2, 37, 37, 54), Block(64, 128, 3, 33, 38, 52))
"""The same of the tiles of ``wide`` (matmul_wide). Times of both are of four layers at 128 to 8192 rows, measured on one H200,
torch 2.11.0 (CUDA 13.0), Triton 3.6.0, 2026-11-23. A tile of 128 x 256 was never the fastest."""

SKINNY_ROWS = 512
"""Rows of x that one call of ``skinny`` takes."""

_NEAR = 1.25  # how far the fastest of what was measured lay above the least estimate at most
_MOST = 8  # where there are many rows and columns, nearly all large blocks are near one another


def estimate(block: Block, m: int, n: int, processors: int) -> float:
    """Microseconds for 4096 of k, m rows and n columns. A block that these do not fill takes as long as a full one."""
    waves, rest = divmod(-(-m // block.rows) * -(-n // block.columns), block.held * processors)
    if rest == 0:
        return waves * block.full
    if rest > processors:
        return (waves + 1) * block.full
    return waves * block.full + block.last if waves else block.alone


@functools.lru_cache(4096)
def fastest(m: int, n: int, processors: int) -> int:
    """The variant of the least estimate: what runs where nothing was measured."""
    return min(range(len(BLOCKS)), key=lambda variant: estimate(BLOCKS[variant], m, n, processors))


@functools.lru_cache(4096)
def wide_tile(m: int, n: int, processors: int) -> tuple[int, int]:
    """Rows and columns of the tile of ``wide`` of the least estimate."""
    rows, columns, *_ = min(WIDE, key=lambda block: estimate(block, m, n, processors))
    return rows, columns


@functools.lru_cache(4096)
def suits_wide(m: int, n: int, processors: int) -> bool:
    """Whether ``wide`` is expected to be faster than ``skinny``."""
    if m <= SKINNY.rows or m > SKINNY_ROWS:
        return m > SKINNY_ROWS
    return min(estimate(b, m, n, processors) for b in WIDE) < estimate(SKINNY, m, n, processors)


def candidates(m: int, n: int, processors: int) -> list[int]:
    """The variants that may be the fastest, for a proof to time: of those near the least estimate the first few."""
    times = sorted((estimate(block, m, n, processors), variant) for variant, block in enumerate(BLOCKS))
    return sorted(variant for time, variant in times[:_MOST] if time <= _NEAR * times[0][0])
