"""Reductions along rows in the contract's order, as explicit loops over blocks and halvings.

Arrays are [rows, n] of float32; all rows go through one loop together, which no row can see. numpy's own sum and mean
are pairwise and are not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from detinfer.reference import elementwise
from detinfer.reference.arithmetic import DType, Float, fma, rounded, single

LANES = 1024

WeightMode = Literal["llama", "fp32", "gemma"]
ResidualMode = Literal["R", "U"]


def _in_lanes(x: Float, add: Callable[[Float, Float], Float]) -> Float:
    # Lane l takes elements l, l + 1024, ... ascending; lanes are halved; a missing term is -0.
    rows, n = x.shape
    lanes = np.full((rows, LANES), np.float32(-0.0))
    for start in range(0, n, LANES):
        block = x[:, start : start + LANES]
        width = block.shape[1]
        lanes[:, :width] = add(lanes[:, :width], block)
    half = LANES // 2
    while half >= 1:
        lanes[:, :half] = lanes[:, :half] + lanes[:, half : 2 * half]
        half //= 2
    return single(lanes[:, 0])


def row_sum(x: Float) -> Float:
    """[rows, n] to [rows]: 1024 lanes, then their halving; +0 for a row of no elements."""
    with np.errstate(all="ignore"):
        return _in_lanes(x, lambda lane, e: lane + e) if x.shape[1] else np.zeros(len(x), np.float32)


def square_sum(x: Float) -> Float:
    """[rows, n] to [rows]: the same order, each lane ``fma(e, e, lane)``."""
    with np.errstate(all="ignore"):
        return _in_lanes(x, lambda lane, e: fma(e, e, lane))


def mean(x: Float) -> Float:
    """[rows, n] to [rows]: row_sum divided by n."""
    with np.errstate(all="ignore"):
        return single(row_sum(x) / np.float32(x.shape[1]))


def greatest(x: Float) -> Float:
    """[rows, n] to [rows]: NaN wins, +0 > -0. Order-free."""
    return _extreme(x, np.float32(-np.inf), np.max, lambda negative: negative.all(axis=1))


def least(x: Float) -> Float:
    """[rows, n] to [rows]: NaN wins, -0 < +0. Order-free."""
    return _extreme(x, np.float32(np.inf), np.min, lambda negative: negative.any(axis=1))


def _extreme(x: Float, otherwise: Any, pick: Any, sign: Any) -> Float:
    found = pick(np.where(np.isnan(x), otherwise, x), axis=1)
    # Where it is a zero, numpy's sign is that of some zero of the row: only zeros count for the sign.
    zeros = x == 0
    negative = sign(np.signbit(x) | ~zeros) if pick is np.max else sign(np.signbit(x) & zeros)
    found = np.where(found == 0, np.where(negative, np.float32(-0.0), np.float32(0.0)), found)
    return single(np.where(np.isnan(x).any(axis=1), np.nan, found))


def _shifted_exp(x: Float) -> tuple[Float, Float]:
    greatest = np.max(np.where(np.isnan(x), np.float32(-np.inf), x), axis=1, keepdims=True, initial=-np.inf)
    shifted = x - greatest
    return shifted, elementwise.exp(shifted)


def softmax(x: Float) -> Float:
    """[rows, n]: e^(x - max) divided by its row_sum. A row of -Inf, or with NaN or +Inf in it, is NaN throughout."""
    with np.errstate(all="ignore"):
        _, e = _shifted_exp(x)
        return single(e / row_sum(e)[:, None])


def log_softmax(x: Float) -> Float:
    """[rows, n]: (x - max) - log(row_sum of e^(x - max)), the logarithm rounded to float32."""
    with np.errstate(all="ignore"):
        shifted, e = _shifted_exp(x)
        return single(shifted - elementwise.unary("log", row_sum(e))[:, None])


def _inverse_root(mean_square: Float, eps: float) -> Float:
    return single(np.float32(1) / np.sqrt(mean_square + np.float32(eps)))


def rms_norm(x: Float, weight: Float | None, eps: float, mode: WeightMode, dtype: DType) -> tuple[Float, Float]:
    """(h r weight, r) with r = 1 / sqrt(mean of squares + eps); the result is not yet rounded to ``dtype``.

    Weight modes: ``llama`` rounds h r to ``dtype`` before it multiplies, ``fp32`` does not, ``gemma`` multiplies by
    1 + weight.
    """
    with np.errstate(all="ignore"):
        r = _inverse_root(square_sum(x) / np.float32(x.shape[1]), eps)
        y = x * r[:, None]
        if weight is None:
            return y, r
        if mode == "llama":
            return rounded(y, dtype) * weight, r
        return y * (np.float32(1) + weight if mode == "gemma" else weight), r


def add_rms_norm(
    x: Float,
    residual: Float,
    weight: Float | None,
    eps: float,
    mode: WeightMode,
    residual_mode: ResidualMode,
    dtype: DType,
) -> tuple[Float, Float]:
    """(RMSNorm of x + residual, x + residual rounded to ``dtype``); mode ``U`` normalises the unrounded sum."""
    with np.errstate(all="ignore"):
        total = x + residual
        stored = rounded(total, dtype)
        return rms_norm(stored if residual_mode == "R" else total, weight, eps, mode, dtype)[0], stored


def layer_norm(x: Float, weight: Float | None, bias: Float | None, eps: float) -> tuple[Float, Float, Float]:
    """(((x - mean) r) weight + bias, mean, r): one multiplication after another, then the addition."""
    with np.errstate(all="ignore"):
        center = mean(x)
        deviation = x - center[:, None]
        r = _inverse_root(square_sum(deviation) / np.float32(x.shape[1]), eps)
        y = deviation * r[:, None]
        y = y if weight is None else y * weight
        return single(y if bias is None else y + bias), center, r
