"""all_reduce, then the residual's addition and RMSNorm: the two called one after the other, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

from detinfer.reference.all_reduce import Order, Values, all_reduce
from detinfer.reference.arithmetic import DType, Float, load, store
from detinfer.reference.rows import ResidualMode, WeightMode, add_rms_norm


def all_reduce_rms_norm(
    parts: Sequence[Values],
    residual: Values,
    weight: Float | None,
    eps: float,
    dtype: DType,
    mode: ResidualMode = "R",
    weight_mode: WeightMode = "llama",
    order: Order = "rank_order",
) -> tuple[Values, Values]:
    """(norm, residual_out), both [rows, n] bits of ``dtype``; ``parts`` and ``residual`` are such bits too.

    The sum over ranks is rounded to ``dtype`` first. residual_out is (that + residual), rounded, in both modes; mode R
    normalises it, mode U the unrounded sum.
    """
    x = load(all_reduce(parts, dtype, "sum", order), dtype)
    norm, total = add_rms_norm(x, load(residual, dtype), weight, eps, weight_mode, mode, dtype)
    return store(norm, dtype), store(total, dtype)
