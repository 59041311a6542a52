"""Stress inputs for attention, and the proof of its kernel on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from detinfer.ops.evidence import Evidence, from_values, to_values
from detinfer.reference import attention as reference

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@functools.cache
def stress(
    heads: tuple[int, int], queries: int, keys: int, depth: int, value_depth: int, dtype: torch.dtype, batch: int = 1
) -> Inputs:
    """query [batch, H, queries, depth], key and value of Hkv heads, on which the order of keys and of depth shows.

    ``heads`` is (H, Hkv). Every score has a first term of 2^10 that its middle one takes away, and every sum of values a
    first term of 2^15 that its middle one takes away: what lies between is rounded coarsely, what follows finely, so
    that another order gives other bits, in bf16 too. Read them only.
    """
    random = np.random.default_rng(keys * 1000 + depth)

    def uniform(*shape: int) -> Any:
        return random.integers(-(2**20), 2**20, shape) / 2**20

    q = uniform(batch, heads[0], queries, depth)
    k = uniform(batch, heads[1], keys, depth)
    v = np.ldexp(uniform(batch, heads[1], keys, value_depth), random.integers(-10, -1, (batch, heads[1], keys, 1)))
    if depth >= 3:
        q[..., 0], q[..., depth // 2] = 32.0, -32.0
        k[..., 0] += 32.0
        k[..., depth // 2] = k[..., 0]
    if keys >= 3:
        k[..., keys // 2, :] = k[..., 0, :]
        v[..., 0, :] = np.ldexp(1 + np.abs(v[..., 0, :]), 15)
        v[..., keys // 2, :] = -v[..., 0, :]
    return tuple(from_values(t.astype(np.float32), dtype) for t in (q, k, v))  # type: ignore[return-value]


def expected(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """What the reference gives for [B, H, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv] and a mask that broadcasts."""
    group = query.shape[1] // key.shape[1]
    q, k, v = to_values(query), to_values(key), to_values(value)
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    allowed = np.ones((query.shape[-2], key.shape[-2]), np.bool_)
    added = None
    if is_causal:
        allowed = np.tril(allowed)
    if mask is not None and mask.dtype is torch.bool:
        allowed = allowed & mask.numpy()
    elif mask is not None:
        added = to_values(mask)
        allowed = allowed & (added != -np.inf)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return from_values(reference.attention(q, k, v, scale, allowed, added), query.dtype)


def _holes(rows: int, keys: int) -> torch.Tensor:
    """[1, 1, rows, keys]: row r sees no key before key r % 5 and misses some after it; row 3 sees none."""
    key, row = np.arange(keys)[None, :], np.arange(rows)[:, None]
    mask = (key >= row % 5) & ((key * 7 + row) % 5 != 0)
    mask[3 % rows] = False
    return torch.from_numpy(mask)[None, None]


def prove(op: str, dtype: torch.dtype, function: Callable[..., Any]) -> tuple[int, bytes]:
    """Compare ``function`` with the reference: causal, both kinds of masks with NaN in masked K and V, decode, edges."""
    evidence = Evidence(op, dtype)

    query, key, value = stress((3, 1), 35, 35, 15, 49, dtype)
    causal = expected(query, key, value, is_causal=True)
    evidence.expect(function(query, key, value, None, 0.0, True, enable_gqa=True), causal, "causal, 35 keys")
    for at in (0, 1, 17, 34):
        row, seen = query[:, :, at : at + 1], slice(0, at + 1)
        got = function(row, key[:, :, seen], value[:, :, seen], enable_gqa=True)
        evidence.expect(got, causal[:, :, at : at + 1], f"one row on {at + 1} keys")

    query, key, value = (t.clone() for t in stress((2, 2), 8, 49, 8, 20, dtype))
    holes = _holes(8, 49)
    holes[..., 30:33] = False
    key[:, :, 30], value[:, :, 31] = math.nan, math.nan
    value[:, :, 32] = math.inf
    evidence.expect(function(query, key, value, holes), expected(query, key, value, holes), "a bool mask with holes")
    added = from_values(np.arange(8 * 49, dtype=np.float32).reshape(1, 1, 8, 49) % 11 / 4, dtype)
    added = torch.where(holes, added, -math.inf)
    added[0, 0, 5, 7] = torch.finfo(dtype).min
    evidence.expect(function(query, key, value, added), expected(query, key, value, added), "an added mask")

    query, key, value = stress((3, 1), 1, 1100, 4, 3, dtype)
    far = (torch.arange(1100) % 50 != 7)[None, None, None]  # 1078 keys: lanes of row_sum meet again after 1024
    got = function(query, key, value, far, enable_gqa=True)
    evidence.expect(got, expected(query, key, value, far), "1100 keys")

    query, key, value = (t.clone() for t in stress((4, 4), 2, 5, 3, 2, dtype))
    query[0, 0, 0, 1], key[0, 1, 4, 0], key[0, 2, 3, 2], value[0, 3, 4, 1] = math.nan, math.inf, -math.inf, math.nan
    evidence.expect(function(query, key, value), expected(query, key, value), "NaN and infinities")
    return evidence.total()
