"""Scaled dot product attention, one query row over its unmasked keys, in the contract's order.

Leading dimensions go through the loops together, as do query rows: none of them can see another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from detinfer.reference import elementwise, rows
from detinfer.reference.arithmetic import Float, fma

Allowed = NDArray[np.bool_]


def scores(q: Float, k: Float, scale: float, added: Float | None) -> Float:
    """[..., R, D] and [..., N, D] to [..., R, N]: a chain of FMAs over D, ascending, from +0; then ``scale``, ``added``."""
    with np.errstate(all="ignore"):
        s = np.zeros((*np.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2]), np.float32)
        for d in range(q.shape[-1]):
            s = fma(q[..., :, None, d], k[..., None, :, d], s)
        s = s * np.float32(scale)
        total: Float = s if added is None else s + added
    return total


def greatest_score(s: Float, allowed: Allowed, sinks: Float | None = None) -> Float:
    """[..., R, N] to [..., R, 1]: the greatest of the row's unmasked scores and its head's sink."""
    seen = np.where(allowed & ~np.isnan(s), s, np.float32(-np.inf))
    greatest: Float = np.max(seen, axis=-1, keepdims=True, initial=-np.inf)
    return greatest if sinks is None else np.fmax(greatest, sinks[..., None, None])


def weights(s: Float, allowed: Allowed, greatest: Float) -> Float:
    """exp(score - greatest); +0 where masked."""
    with np.errstate(all="ignore"):
        p: Float = np.where(allowed, elementwise.exp(s - greatest), np.float32(0))
    return p


def weight_sums(p: Float, allowed: Allowed) -> Float:
    """row_sum of each row of weights over its unmasked keys: a masked one takes no lane, wherever it lies."""
    n = p.shape[-1]
    flat, seen = p.reshape(-1, n), allowed.reshape(-1, n)
    held = np.full_like(flat, np.float32(-0.0))
    for row in range(len(flat)):
        kept = flat[row][seen[row]]
        held[row, : len(kept)] = kept
    return rows.row_sum(held).reshape(p.shape[:-1])


def attention(
    q: Float,
    k: Float,
    v: Float,
    scale: float,
    allowed: Allowed,
    added: Float | None = None,
    sinks: Float | None = None,
) -> Float:
    """[..., R, D], [..., N, D], [..., N, Dv] to [..., R, Dv], not yet rounded to the storage dtype.

    ``allowed`` [..., R, N] says which keys a row sees and ``added`` is the float mask, or None; both broadcast.
    ``scale`` is rounded to float32 first. A row that sees no key is +0. ``sinks`` [heads] adds to each row's divisor, last,
    exp(sink - greatest), and may be the greatest.
    """
    with np.errstate(all="ignore"):
        s = scores(q, k, scale, added)
        allowed = np.broadcast_to(allowed, s.shape)
        greatest = greatest_score(s, allowed, sinks)
        p = weights(s, allowed, greatest)
        total = weight_sums(p, allowed)
        if sinks is not None:
            total = total + elementwise.exp(sinks[:, None] - greatest[..., 0])
        o = np.zeros((*s.shape[:-1], v.shape[-1]), np.float32)
        for j in range(s.shape[-1]):
            o = np.where(allowed[..., j, None], fma(p[..., j, None], v[..., None, j, :], o), o)
        out: Float = np.where(np.any(allowed, axis=-1, keepdims=True), o / total[..., None], np.float32(0))
    return out
