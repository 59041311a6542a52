"""all_reduce in the contract's two orders, as explicit loops over ranks.

A tensor is its stored elements: uint32 bits of float32, uint16 bits of bfloat16 and float16, values of float64 and of
integers. ``parts[r]`` is rank r's; every part has one shape. Sums of float32, bfloat16 and float16 run in float32 and
are rounded once; float64 runs in float64; integers wrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detinfer.errors import UsageError
from detinfer.reference.arithmetic import DType, load, store

Values = NDArray[Any]
ReduceOp = Literal["sum", "avg", "max", "min"]
Order = Literal["rank_order", "rank_tree"]

CANONICAL_NAN_FLOAT64 = 0x7FFFFFFFFFFFFFFF


def rank_order(parts: Sequence[Values]) -> Values:
    """((x_0 + x_1) + x_2) + ... + x_{N-1}; starts at x_0 and not at +0, so that a sum of -0 stays -0."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def rank_tree(parts: Sequence[Values]) -> Values:
    """Neighbours (2i, 2i + 1) are joined, an odd last one moves up unchanged, until one is left."""
    level = list(parts)
    while len(level) > 1:
        above = [level[i] + level[i + 1] for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            above.append(level[-1])
        level = above
    return level[0]


def _extreme(parts: Sequence[Values], greatest: bool) -> Values:
    # NaN wins, +0 > -0.
    found = parts[0]
    for part in parts[1:]:
        better = part > found if greatest else part < found
        if found.dtype.kind == "f":
            zeros = (part == 0) & (found == 0) & (np.signbit(found) if greatest else np.signbit(part))
            better = (better | zeros | np.isnan(part)) & ~np.isnan(found)
        found = np.where(better, part, found)
    return found


def reduce(parts: Sequence[Values], op: ReduceOp = "sum", order: Order = "rank_order") -> Values:
    """The reduction of values of one dtype, not yet rounded for storage. AVG divides the sum once."""
    with np.errstate(all="ignore"):
        if op in ("max", "min"):
            return _extreme(parts, op == "max")
        if op not in ("sum", "avg") or order not in ("rank_order", "rank_tree"):
            raise UsageError(f"all_reduce: no operation {op!r} in order {order!r}")
        total = rank_order(parts) if order == "rank_order" else rank_tree(parts)
        if op == "sum":
            return total
        if total.dtype.kind != "f":
            raise UsageError(f"all_reduce: AVG of {total.dtype} has no rounding of its own; use SUM")
        mean: Values = total / total.dtype.type(len(parts))
        return mean


def all_reduce(
    parts: Sequence[Values], dtype: DType | None, op: ReduceOp = "sum", order: Order = "rank_order"
) -> Values:
    """What every rank receives. ``dtype`` says how bits are read; None: the arrays hold float64 or integers.

    One rank's part is copied, bit for bit. Any other result that is NaN is the canonical NaN.
    """
    if len(parts) == 1:
        return np.array(parts[0])
    if dtype is not None:
        return store(reduce([load(part, dtype) for part in parts], op, order), dtype)
    result = reduce(parts, op, order)
    if result.dtype.kind == "f":
        bits = np.ascontiguousarray(result).view(np.uint64)
        return np.where(np.isnan(result), np.uint64(CANONICAL_NAN_FLOAT64), bits).view(np.float64)
    return result
