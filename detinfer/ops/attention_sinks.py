"""Attention with a sink for each query head: a score that has no key, and so takes weight and gives nothing (gpt-oss).

The order is that of ``detinfer/ops/attention.py`` but for two places: ``m`` is the greatest of the row's scores and the
sink, and the divisor is ``l = row_sum of p_j``, then ``l + exp(sink - m)``. A row without an unmasked key gives +0.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct

import numpy as np
import torch

from detinfer import native
from detinfer.errors import NativeError, UsageError
from detinfer.ops import attention, attention_proof
from detinfer.ops.evidence import Evidence, from_values, to_values
from detinfer.reference import attention as reference

NAME = "detinfer::attention_with_sinks"

_args = struct.Struct("@7P")  # AttentionSinksArgs of csrc/attention.h


def attention_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax over the keys and one sink, times the values; ``sinks`` is [H] of any dtype and used in fp32.

    ``query`` is [B, H, Lq, D], ``key`` [B, Hkv, Lk, D] and ``value`` [B, Hkv, Lk, Dv], Hkv a divisor of H; the other
    arguments are ``scaled_dot_product_attention``'s. Returns a fresh [B, H, Lq, Dv]. Raises UsageError for shapes that
    do not fit and UnsupportedDtype for float64 and integers.
    """
    if sinks.shape != query.shape[1:2] or query.dim() != 4:
        raise UsageError(
            f"{NAME}: sinks of {list(sinks.shape)} for a query of {list(query.shape)}: [H] for [B, H, Lq, D]"
        )
    attention.refuse(query, key, value, attn_mask, 0.0)
    shape, views = attention.views(query, key, value, attn_mask, True)
    call = attention.plan(query, shape, views, is_causal, scale)
    try:
        run = native.entry("attention_sinks", _args.size + ctypes.sizeof(call.plan))
    except AttributeError as error:
        raise NativeError(f"{NAME}: the native library is older than this detinfer: reinstall detinfer") from error
    out = torch.empty_strided(call.shape, call.stride, dtype=call.dtype)
    wide = sinks.float().contiguous()
    pointers = [0 if t is None else t.data_ptr() for t in (*views, out, wide)]
    native.check(run(_args.pack(call.address, *pointers)))
    return out


@functools.cache
def prove(dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare the kernel with the reference: causal, decode, a mask with holes, sinks above and below every score.

    Returns how many results were compared and their bytes. Raises Diverged with the first difference.
    """
    native.dtype_code(dtype, NAME)
    evidence = Evidence(NAME, dtype)
    for heads, queries, keys, depth, width in (((4, 2), 35, 35, 15, 49), ((3, 1), 2, 1100, 4, 3)):
        query, key, value = attention_proof.stress(heads, queries, keys, depth, width, dtype)
        sinks = from_values(np.array([-40.0, 0.37, 5.3, 90.0][: heads[0]], np.float32), dtype)
        got = attention_with_sinks(query, key, value, sinks, is_causal=True)
        causal = expected(query, key, value, sinks, is_causal=True)
        evidence.expect(got, causal, f"causal, {keys} keys")
        row = query[:, :, -1:]
        seen = slice(0, queries)
        got = attention_with_sinks(row, key[:, :, seen], value[:, :, seen], sinks)
        evidence.expect(got, causal[:, :, -1:], f"one row on {queries} keys")
        holes = (torch.arange(keys)[None, :] % 5 != torch.arange(queries)[:, None] % 5) & (torch.arange(keys) > 2)
        holes[-1] = False
        got = attention_with_sinks(query, key, value, sinks, holes[None, None])
        evidence.expect(got, expected(query, key, value, sinks, holes[None, None]), f"holes among {keys} keys")
    return evidence.total()


def prove_cuda(dtype: torch.dtype) -> tuple[int, bytes]:
    """On a GPU: ``attention_cuda.attention`` with sinks against its plain kernel; (results compared, their bytes)."""
    from detinfer.ops import attention_cuda

    evidence = Evidence(NAME, dtype)
    query, key, value = (t.cuda() for t in attention_proof.stress((4, 2), 35, 300, 64, 64, dtype))
    sinks = from_values(np.array([-40.0, 0.37, 5.3, 90.0], np.float32), dtype).cuda()
    holes = (torch.arange(300)[None, :] % 5 != torch.arange(35)[:, None] % 5)[None, None].cuda()
    added = torch.zeros(holes.shape, device="cuda").masked_fill(~holes, -math.inf)
    wanted = attention_cuda.reference(query, key, value, added, sinks=sinks)
    got = attention_cuda.attention(query, key, value, causal=False, mask=holes, sinks=sinks)
    evidence.expect(got.cpu(), wanted.cpu(), "a mask with holes")
    one = attention_cuda.attention(query[:, :, -1:], key, value, causal=False, mask=holes[:, :, -1:], sinks=sinks)
    evidence.expect(one.cpu(), wanted[:, :, -1:].cpu(), "one row")
    return evidence.total()


def expected(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """What the reference gives; ``mask`` is bool and broadcasts to [B, H, Lq, Lk]."""
    group = query.shape[1] // key.shape[1]
    q, k, v = to_values(query), to_values(key), to_values(value)
    allowed = np.ones((query.shape[-2], key.shape[-2]), np.bool_)
    if is_causal:
        allowed = np.tril(allowed)
    if mask is not None:
        allowed = allowed & mask.numpy()
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    values = reference.attention(q, k, v, 1 / math.sqrt(query.shape[-1]), allowed, sinks=to_values(sinks))
    return from_values(values, query.dtype)
