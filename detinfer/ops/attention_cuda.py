"""Scaled dot product attention on GPUs in one order: every query row is a function of itself and of its keys.

The keys of a row lie in blocks of 64, counted from the row's first unmasked key (or from the sequence's start, where it
is given), and the blocks in splits: 256 keys each up to 4096, longer in longer rows, so that there are at most 16.
Inside a split the blocks go through an online softmax, ascending; the splits' results are merged, ascending. All sums
are the matrix unit's, accumulated in fp32; docs/ops/attention.md has the order in words.

Which program of a launch computes what is free: ``tiles`` walks all splits of many rows, ``decode`` gives each split of
few rows to a program of its own and the last one to arrive merges them. Prefill, prefill in pieces, decode, any batch
and any padding give the same bytes. bf16, fp16 and, slowly, fp32. Needs Triton, which comes with torch's CUDA wheels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from detinfer.errors import RefusedError, UnsupportedDtype, UsageError
from detinfer.ops.attention import NAME, refuse, views
from detinfer.ops.attention_cuda_launch import LOG2E, Keys, Launch, kernels_of_triton, padded, plan, run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query @ key.mT * scale + mask) @ value in the order of this module; the arguments are torch's.

    Shapes, masks, ``scale``, the result's layout and what is raised are those of ``detinfer.ops.attention``, on one GPU;
    depths up to 256. A row's blocks are counted from its first unmasked key.
    """
    signature = (
        query.dtype, key.dtype, value.dtype, query.shape, key.shape, value.shape,
        query.stride(), key.stride(), value.stride(), dropout_p, is_causal, scale, enable_gqa, query.device, key.device, value.device,
        None if attn_mask is None else (attn_mask.dtype, attn_mask.shape, attn_mask.stride(), attn_mask.device),
    )  # fmt: skip
    if (launch := _launches.get(signature)) is not None and _aligned(query, key, value):
        return launch.start(query, key, value, Keys(attn_mask))[0]
    if not (query.is_floating_point() or query.is_complex()):
        return NotImplemented
    return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, False, signature)[0]


_launches: dict[tuple[Any, ...], Launch] = {}
_KEPT_LAUNCHES = 4096


def _aligned(*tensors: torch.Tensor) -> bool:
    return all(t.data_ptr() % 16 == 0 for t in tensors)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    want_lse: bool,
    signature: tuple[Any, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if query.dtype not in DTYPES:
        raise UnsupportedDtype(f"{NAME}: {query.dtype} has no canonical order; use bfloat16, float16 or float32")
    refuse(query, key, value, mask, dropout_p)
    shape, (q, k, v, added) = views(query, key, value, mask, enable_gqa)
    stride: tuple[int, ...] | None = None
    if query.dim() == 4 and query.shape == shape and (like := torch.empty_like(query).stride())[3] == 1:
        stride = like
    keys = Keys(added, is_causal)
    out, lse = run(q, k, v, keys, scale, stride, want_lse)
    given, seen = (query, key, value, q if mask is None else mask), (q, k, v, q if added is None else added)
    if (
        signature is not None
        and len(shape) == 4
        and (scale is None or scale >= 0)
        and _aligned(q, k, v)
        and all(a.data_ptr() == b.data_ptr() for a, b in zip(given, seen, strict=True))
    ):
        # The views read the caller's own memory: the next call of this signature needs none.
        if len(_launches) >= _KEPT_LAUNCHES:
            _launches.clear()
        chosen = 1.0 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale
        _launches[signature] = plan(q, k, v, keys, chosen, stride, False)
    return (out if len(shape) == 4 else out.view(shape)), lse


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = True,
    window: int = 0,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention over keys whose sequence is known: [B, H, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv] to [B, H, Lq, Dv].

    Query rows are the last ones: with ``causal`` row i of Lq sees the keys up to Lk - Lq + i, of each sequence b up to
    ``lengths[b] - Lq + i``. ``starts`` [B] int32 are the sequences' first keys (left padding), from which blocks are
    counted; 0 unless given. With ``window`` a row sees its last ``window`` keys. ``sinks`` [H]: logits that take part in
    each row's sum and nothing else. ``mask`` as in ``scaled_dot_product_attention``; not together with ``window``,
    ``starts`` or ``lengths``. ``starts`` and ``lengths`` lie on the GPU and are not read on the host.

    Raises UsageError for what does not fit, UnsupportedDtype for other dtypes than bf16, fp16 and fp32.
    """
    if mask is not None and (window or starts is not None or lengths is not None):
        raise UsageError("attention: a mask says itself what a row sees; leave out window, starts and lengths")
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise UsageError(
            f"attention: query, key and value have {query.dim()}, {key.dim()}, {value.dim()} dimensions, not 4"
        )
    if query.dtype not in DTYPES:
        raise UnsupportedDtype(f"attention: {query.dtype} has no canonical order; use bfloat16, float16 or float32")
    if window < 0:
        raise UsageError(f"attention: window={window}; give a number of keys, or 0 for all")
    refuse(query, key, value, mask, 0.0)
    _, (q, k, v, added) = views(query, key, value, mask, True)
    for name, t in (("starts", starts), ("lengths", lengths)):
        _check_integers(f"attention: {name}", t, (query.shape[0],), query.device)
    keys = Keys(added, causal, key.shape[2] - query.shape[2], window, starts, lengths, None, sinks)
    return run(q, k, v, keys, scale, None, False)[0]


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    causal: bool = True,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention over a paged cache: query [B, H, Lq, D], caches [pages, page, Hkv, D] and [pages, page, Hkv, Dv].

    Key n of sequence b lies in page ``block_table[b, n // page]`` at ``n % page``; ``block_table`` [B, n] and
    ``lengths`` [B], the keys of each sequence with the new ones, are int32 on the GPU and not read on the host. Row i of
    Lq sits at position ``lengths[b] - Lq + i``. The bytes are those of ``attention`` on the same keys in one piece; pages
    and slots past a sequence's end are not read. Returns [B, H, Lq, Dv].
    """
    if (
        query.dim() != 4
        or key_cache.dim() != 4
        or value_cache.dim() != 4
        or key_cache.shape[:3] != value_cache.shape[:3]
    ):
        shapes = ", ".join(str(list(t.shape)) for t in (query, key_cache, value_cache))
        raise UsageError(
            f"paged_attention: {shapes}; query is [B, H, Lq, D], the caches [pages, page, Hkv, D] and [pages, page, Hkv, Dv]"
        )
    if query.dtype not in DTYPES or key_cache.dtype != query.dtype or value_cache.dtype != query.dtype:
        found = f"{query.dtype}, {key_cache.dtype}, {value_cache.dtype}"
        raise UnsupportedDtype(f"paged_attention: {found}; use one of bfloat16, float16, float32 for all three")
    heads, kv_heads = query.shape[1], key_cache.shape[2]
    if query.shape[3] != key_cache.shape[3] or kv_heads == 0 or heads % kv_heads:
        raise UsageError(
            f"paged_attention: {heads} heads of depth {query.shape[3]} do not fit {kv_heads} of {key_cache.shape[3]}"
        )
    if block_table.dim() != 2:
        raise UsageError(
            f"paged_attention: block_table has {block_table.dim()} dimensions; it is [B, pages of a sequence]"
        )
    _check_integers("paged_attention: block_table", block_table, (query.shape[0], block_table.shape[1]), query.device)
    _check_integers("paged_attention: lengths", lengths, (query.shape[0],), query.device)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key_cache, value_cache))
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    keys = Keys(None, causal, 0, window, None, lengths, table, sinks)
    return run(q, k.transpose(1, 2), v.transpose(1, 2), keys, scale, None, False)[0]


def _check_integers(what: str, t: torch.Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if t is not None and (t.dtype is not torch.int32 or t.shape != shape or t.device != device):
        raise UsageError(
            f"{what} is {t.dtype} {list(t.shape)} on {t.device}; it has to be int32 {list(shape)} on {device}"
        )


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention: (output, logsumexp, and what only a backward pass would read)."""
    _no_debug_mask(return_debug_mask)
    out, lse = _sdpa(query, key, value, None, dropout_p, is_causal, scale, True, True)
    return out, lse, None, None, query.shape[-2], key.shape[-2], *_seeds(query), query.new_empty(0)


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_efficient_attention."""
    out, lse = _sdpa(query, key, value, attn_bias, dropout_p, is_causal, scale, False, compute_log_sumexp)
    return out, _or_empty(lse, query), *_seeds(query)


def _cudnn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_cudnn_attention."""
    _no_debug_mask(return_debug_mask)
    out, lse = _sdpa(query, key, value, attn_bias, dropout_p, is_causal, scale, True, compute_log_sumexp)
    sizes = (query.shape[-2], key.shape[-2])
    return out, _or_empty(lse, query), None, None, *sizes, *_seeds(query), query.new_empty(0)


def _no_debug_mask(wanted: bool) -> None:
    if wanted:
        raise RefusedError(f"{NAME}: return_debug_mask asks for the mask of a dropout, and there is none")


def _or_empty(lse: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    return query.new_empty((*query.shape[:-2], 0), dtype=torch.float32) if lse is None else lse


def _seeds(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What dropout would have drawn from: nothing is drawn."""
    return torch.zeros(2, dtype=torch.int64, device=query.device), torch.zeros(
        0, dtype=torch.int64, device=query.device
    )


COVERED: dict[str, Callable[..., Any]] = {
    NAME: scaled_dot_product_attention,
    "aten::_scaled_dot_product_flash_attention": _flash,
    "aten::_scaled_dot_product_efficient_attention": _efficient,
    "aten::_scaled_dot_product_cudnn_attention": _cudnn,
}
"""``aten::name``: the function that computes it, with the schema's own signature. ``_scaled_dot_product_attention_math``
is not among them: it hands out the weights, which exist nowhere here; torch composes it of products and a softmax."""

REDUCES: frozenset[str] = frozenset(COVERED)
"""Those of them that contain a reduction."""


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    added: torch.Tensor | None = None,
    *,
    first: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    split: int = 0,
    backwards: bool = False,
) -> torch.Tensor:
    """The pinned plain kernel, one query row a program: [B, H, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv] to [B, H, Lq, Dv].

    ``added`` broadcasts to [B, H, Lq, Lk], fp32, -inf where masked. ``first`` broadcasts to [B, H, Lq]: where the blocks
    of each row begin; its first unmasked key unless given. ``split`` and ``backwards`` give other, wrong orders.
    """
    (batch, heads, queries, depth), (keys, value_depth) = query.shape, value.shape[2:]
    q, k, v = query.contiguous(), key.contiguous(), value.contiguous()
    if added is None:
        added = torch.zeros((), dtype=torch.float32, device=q.device)
    added = added.float().expand(batch, heads, queries, keys).contiguous()
    seen = added != -math.inf
    at = torch.arange(keys, device=q.device, dtype=torch.int32)
    end = torch.where(seen, at + 1, 0).amax(-1).to(torch.int32).contiguous()
    if first is None:
        first = torch.where(seen, at, keys).amin(-1)
    first = torch.minimum(first.expand(batch, heads, queries).to(torch.int32), end).contiguous()
    out = torch.empty((batch, heads, queries, value_depth), dtype=q.dtype, device=q.device)
    scale = torch.tensor(1.0 / math.sqrt(depth) if scale is None else scale, dtype=torch.float32).item()
    kernels_of_triton().plain[(batch * heads * queries,)](
        q, k, v, out, added, first, end, q if sinks is None else sinks, heads, queries, keys, heads // key.shape[1],
        scale * LOG2E, D=depth, DV=value_depth, DP=padded(depth), DVP=padded(value_depth), SINK=sinks is not None,
        SPLIT=split, BACKWARDS=backwards, num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare every path with the plain kernel on stress inputs on the current GPU: (results compared, their bytes).

    Raises Diverged with the first difference, UnsupportedDtype for a dtype without an order.
    """
    from detinfer.ops import attention_cuda_proof

    if dtype not in DTYPES:
        raise UnsupportedDtype(f"{op}: {dtype} has no canonical order; use bfloat16, float16 or float32")
    return attention_cuda_proof.prove(op, dtype)
