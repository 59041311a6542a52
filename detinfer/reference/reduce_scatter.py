"""reduce_scatter: the caller's slice of all_reduce, so that reduce_scatter then all_gather gives all_reduce's bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detinfer.errors import UsageError
from detinfer.reference.all_reduce import Order, ReduceOp, Values, all_reduce
from detinfer.reference.arithmetic import DType


def reduce_scatter(
    parts: Sequence[Values],
    rank: int,
    dtype: DType | None,
    dim: int = 0,
    op: ReduceOp = "sum",
    order: Order = "rank_order",
) -> Values:
    """What ``rank`` receives: slice ``rank`` of N equal slices along ``dim`` of the reduced tensor."""
    size = parts[0].shape[dim]
    if size % len(parts):
        raise UsageError(f"reduce_scatter: dimension {dim} of size {size} has no {len(parts)} equal slices")
    width = size // len(parts)
    whole = all_reduce(parts, dtype, op, order)
    return np.take(whole, range(rank * width, (rank + 1) * width), axis=dim)
