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


def matmul(a: Float, b: Float, c: Float | None = None, alpha: float = 1.0, beta: float = 1.0) -> Float:
    """[..., M, K] times [..., K, N] as fp32 values before the final rounding to the dtype.

    ``c`` broadcasts to [..., M, N]; leading dimensions broadcast.
    """
    rows, columns, terms = a.shape[-2], b.shape[-1], a.shape[-1]
    leading = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    acc = np.zeros((*leading, rows, columns), np.float32)
    for k in range(terms):
        acc = fma(a[..., :, k, None], b[..., None, k, :], acc)
    with np.errstate(all="ignore"):
        if alpha != 1:
            acc = np.float32(alpha) * acc
        if c is not None:
            acc = acc + (np.float32(beta) * c if beta != 1 else c)
    return acc
