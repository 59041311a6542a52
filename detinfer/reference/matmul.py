"""linear, matmul and their kin: one chain of FMAs for each output, k ascending, from +0.

``out[m, n] = RNE_T(alpha * chain_k fma(a[m, k], b[k, n], acc) + beta * c[m, n])``, all in fp32: the chain, then the
multiplication by alpha (if it is not 1), then ``beta * c`` (a multiplication if beta is not 1) and its addition, then
one rounding to the dtype. On CPU a chain is never cut: the leaf is all of K in every dtype.
"""

from __future__ import annotations

import numpy as np

from detinfer.reference.arithmetic import Float, fma


def leaf_length(k: int, n: int, dtype: str) -> int:
    """Terms of one chain for K = ``k`` and N = ``n``: all of them, on CPU, whatever the shape and the dtype."""
    return k


def chain(a: Float, b: Float) -> Float:
    """[..., M, K] times [..., K, N]: acc = fma(a[m, k], b[k, n], acc), k ascending from 0, acc from +0."""
    leading = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    acc = np.zeros((*leading, a.shape[-2], b.shape[-1]), np.float32)
    for k in range(a.shape[-1]):
        acc = fma(a[..., :, k, None], b[..., None, k, :], acc)
    return acc


def finish(acc: Float, c: Float | None = None, alpha: float = 1.0, beta: float = 1.0) -> Float:
    """alpha * acc + beta * c in fp32, one operation after the other; ``c`` broadcasts to acc."""
    with np.errstate(all="ignore"):
        if alpha != 1:
            acc = acc * np.float32(alpha)
        if c is not None:
            acc = acc + (c * np.float32(beta) if beta != 1 else c)
    return acc


def matmul(a: Float, b: Float, c: Float | None = None, alpha: float = 1.0, beta: float = 1.0) -> Float:
    """alpha * a @ b + beta * c as fp32 values before the final rounding to the dtype; leading dimensions broadcast."""
    return finish(chain(a, b), c, alpha, beta)
