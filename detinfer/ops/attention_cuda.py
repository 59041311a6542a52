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

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from detinfer.errors import NativeError, RefusedError, UnsupportedDtype, UsageError
from detinfer.ops.attention import NAME, refuse, views

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256
"""Greatest depth of a head."""

_LOG2E = math.log2(math.e)
_SCANNED = 16384  # a mask up to here is read by the decode kernel itself
_FEW_ROWS = 16  # the least rows of a tile on the matrix unit
Span = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@functools.cache
def _kernels() -> Any:
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor

        from detinfer.ops import attention_plain_triton, attention_prefill_triton, attention_triton
    except ImportError as error:
        raise NativeError(
            f"attention on a GPU needs Triton, which cannot be imported ({error}): install a CUDA build of torch, or the "
            "triton package of the version that this torch names"
        ) from None
    return SimpleNamespace(
        prefill=attention_prefill_triton.prefill,
        tiles=attention_triton.tiles,
        decode=attention_triton.decode,
        spans=attention_plain_triton.spans,
        plain=attention_plain_triton.plain,
        descriptor=TensorDescriptor,
        block=attention_triton.BLOCK.value,
        least=attention_triton.LEAST.value,
        most=attention_triton.MOST.value,
    )


@dataclass(frozen=True)
class Keys:
    """Which keys each query row sees, and where they lie.

    ``added``: a mask [B, H, Lq, Lk] (bool: False is masked; floating point: added after the scale, -inf is masked).
    ``causal``: row i sees the keys up to i + ``shift``. ``window``: of those the last ``window`` ones. ``starts`` [B]
    int32: the first key of each sequence, from which its blocks are counted. ``lengths`` [B] int32: one past its last;
    with it, ``shift`` is lengths - Lq. ``table`` [B, n] int32: the pages of a paged cache.
    """

    added: torch.Tensor | None = None
    causal: bool = False
    shift: int = 0
    window: int = 0
    starts: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    table: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


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
    if not (query.is_floating_point() or query.is_complex()):
        return NotImplemented
    return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, False)[0]


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if query.dtype not in DTYPES:
        raise UnsupportedDtype(f"{NAME}: {query.dtype} has no canonical order; use bfloat16, float16 or float32")
    refuse(query, key, value, mask, dropout_p)
    shape, (q, k, v, added) = views(query, key, value, mask, enable_gqa)
    stride: tuple[int, ...] | None = None
    if query.dim() == 4 and query.shape == shape and (like := torch.empty_like(query).stride())[3] == 1:
        stride = like
    out, lse = _run(q, k, v, Keys(added, is_causal), scale, stride, want_lse)
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
    return _run(q, k, v, keys, scale, None, False)[0]


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
    return _run(q, k.transpose(1, 2), v.transpose(1, 2), keys, scale, None, False)[0]


def _check_integers(what: str, t: torch.Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if t is not None and (t.dtype is not torch.int32 or t.shape != shape or t.device != device):
        raise UsageError(
            f"{what} is {t.dtype} {list(t.shape)} on {t.device}; it has to be int32 {list(shape)} on {device}"
        )


@dataclass(frozen=True)
class Shape:
    """How a launch is cut: rows of a tile, warps, stages of the pipeline."""

    rows: int
    warps: int
    stages: int


def _tile(depth: int, dtype: torch.dtype) -> Shape:
    if dtype is torch.float32:
        return Shape(16, 4, 1)
    if depth <= 128:
        return Shape(128, 8, 2)
    return Shape(64, 8, 2)


def _large(depth: int, dtype: torch.dtype) -> Shape:
    return Shape(128, 8, 3)


def _few(depth: int, dtype: torch.dtype) -> Shape:
    if dtype is torch.float32:
        return Shape(_FEW_ROWS, 4, 1)
    return Shape(_FEW_ROWS, 2, 3) if depth <= 128 else Shape(_FEW_ROWS, 4, 2)


def _padded(depth: int) -> int:
    return max(16, 1 << (depth - 1).bit_length())


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Keys,
    scale: float | None,
    stride: tuple[int, ...] | None,
    want_lse: bool,
    path: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, H, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv] (a paged cache: [pages, Hkv, page, D]) with contiguous rows.

    ``path`` holds the call to ``tiles``, ``prefill`` or ``decode``.
    """
    (batch, heads, queries, depth), value_depth = q.shape, v.shape[3]
    if max(depth, value_depth) > WIDEST:
        raise RefusedError(
            f"{NAME}: a depth of {max(depth, value_depth)} is more than the {WIDEST} that the kernels take"
        )
    _check_devices(q, k, v, keys)
    if k.shape[1] > 1 and k.stride(1) == 0 and v.stride(1) == 0:
        k, v = k[:, :1], v[:, :1]  # one head, shown many times
    paged = keys.table is not None
    page = k.shape[2] if paged else 0
    n_keys = page * keys.table.shape[1] if keys.table is not None else k.shape[2]
    shape = (batch, heads, queries, value_depth)
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    if stride is not None:
        out = torch.empty_strided(shape, stride, dtype=q.dtype, device=q.device)
    lse = torch.empty(shape[:3], dtype=torch.float32, device=q.device) if want_lse else None
    if out.numel() == 0 or n_keys == 0:
        return out.zero_(), lse
    if scale is None:
        scale = 1.0 / math.sqrt(depth) if depth else 1.0
    scale = torch.tensor(scale, dtype=torch.float32).item()
    if scale < 0:
        q, scale = -q, -scale
    with torch.cuda.device(q.device):
        _launch(q, k, v, out, lse, keys, scale * _LOG2E, n_keys, page, path)
    return out, lse


def _check_devices(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys) -> None:
    given = [t for t in (q, k, v, keys.added, keys.sinks) if t is not None]
    if q.device.type != "cuda" or any(t.device != q.device for t in given):
        raise UsageError(f"{NAME}: tensors on {[str(t.device) for t in given]}; they must lie on one GPU")
    if keys.sinks is not None and (keys.sinks.shape != q.shape[1:2] or not keys.sinks.is_contiguous()):
        raise UsageError(f"{NAME}: sinks are {list(keys.sinks.shape)}; they must be [{q.shape[1]}], contiguous")


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    keys: Keys,
    c: float,
    n_keys: int,
    page: int,
    path: str | None,
) -> None:
    kernels = _kernels()
    (batch, heads, queries, depth), kv_heads, value_depth = q.shape, k.shape[1], v.shape[3]
    group, share, mask = heads // kv_heads, 1, keys.added
    mask_kind = 0 if mask is None else 1 if mask.dtype is torch.bool else 2
    # Rows that all see the same keys may share a program of the decode kernel.
    alike = not keys.causal or queries == 1
    by_head = False
    if mask is not None:
        alike = alike and (queries == 1 or mask.stride(2) == 0)
        by_head = heads > 1 and mask.stride(1) != 0
    if group > 64:
        group, share, kv_heads = 1, group, heads
    positions = max(1, min(queries, _FEW_ROWS // group)) if alike else 1
    shape = _tile(max(depth, value_depth), q.dtype)
    rows = max(shape.rows, group)
    few = -(-queries // positions)
    tiles = -(-queries // (rows // group)) * batch * kv_heads
    least, most = kernels.least, kernels.most
    if path is None:
        path = (
            "decode"
            if queries == 1 or few == 1 or (few <= 8 and tiles < 64 and n_keys >= 4 * least)
            else "tiles_or_prefill"
        )
    if path == "decode" and by_head and group > 1:
        group, share, kv_heads = 1, group, heads
        positions = max(1, min(queries, _FEW_ROWS)) if alike else 1
        few = -(-queries // positions)
    scan = path == "decode" and mask is not None and n_keys <= _SCANNED
    span: Span | None = None
    if mask is not None and not scan:
        span = _spans(mask, keys.causal, keys.shift)
    none = q  # a pointer that is not followed
    strides = (
        *(*q.stride()[:3], k.stride(0), k.stride(1), k.stride(2), k.stride(0)),
        *(v.stride(0), v.stride(1), v.stride(2), v.stride(0), *out.stride()[:3]),
    )
    if page:  # the batch is in the table
        strides = (*strides[:3], 0, *strides[4:7], 0, *strides[8:])
    table_b = keys.table.stride(0) if keys.table is not None else 0
    spread = (0, 0, 0) if span is None else span[0].stride()
    spread = (
        tuple(0 if n == 1 else s for n, s in zip(span[0].shape, spread, strict=True)) if span is not None else spread
    )
    added = mask if mask is None or mask_kind == 2 else mask.view(torch.uint8)
    bias = (0, 0, 0, 0) if added is None else added.stride()
    first, end, holes = (none, none, none) if span is None else span
    pointers = [
        *(q, k, v, out, none if lse is None else lse, none if keys.sinks is None else keys.sinks),
        *(none if t is None else t for t in (keys.table, keys.lengths, keys.starts)),
        *(first, end, holes, none if added is None else added),
    ]
    numbers = (kv_heads, heads, queries, n_keys, keys.shift, keys.window, c, *strides, table_b, *spread, *bias)
    constants: dict[str, Any] = {
        "G": group, "SHARE": share, "D": depth, "DV": value_depth, "DP": _padded(depth), "DVP": _padded(value_depth),
        "PAGE": page, "CAUSAL": keys.causal, "WINDOW": keys.window > 0, "SPANS": span is not None, "MASK": mask_kind,
        "STARTED": keys.starts is not None, "COUNTED": keys.lengths is not None, "SINK": keys.sinks is not None,
        "WANT_LSE": lse is not None, "enable_fp_fusion": False,
    }  # fmt: skip
    fast = path == "prefill" or (path == "tiles_or_prefill" and _plain(q, k, v, keys, rows // group, n_keys, kernels))
    if fast:
        shape = _large(max(depth, value_depth), q.dtype)
        rows = max(shape.rows, group)
        grid = (-(-queries // (rows // group)), batch * kv_heads)
        kernels.prefill[grid](
            *(q, k, v, _described(k, kernels), _described(v, kernels), out, none if lse is None else lse),
            *(kv_heads, heads, queries, n_keys, keys.shift, 0, c),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
            G=group, SHARE=share, D=depth, DV=value_depth, DP=_padded(depth), DVP=_padded(value_depth), BM=rows,
            CAUSAL=keys.causal, WANT_LSE=lse is not None, num_warps=shape.warps, num_stages=shape.stages,
            enable_fp_fusion=False,
        )  # fmt: skip
        return
    if path != "decode":
        grid = (-(-queries // (rows // group)), batch * kv_heads)
        kernels.tiles[grid](
            *pointers, *numbers, **constants, BM=rows, num_warps=shape.warps, num_stages=shape.stages
        )  # fmt: skip
        return
    few_shape = _few(max(depth, value_depth), q.dtype)
    tile_rows = max(few_shape.rows, 1 << (group * positions - 1).bit_length())
    programs, splits = batch * kv_heads * few, min(most, -(-n_keys // least)) if n_keys else 1
    parts = _workspace(q.device, programs, splits, group * positions, _padded(value_depth))
    kernels.decode[(splits, programs)](
        *pointers, *parts, *numbers, **constants, BM=tile_rows, POSITIONS=positions, SCAN=scan,
        num_warps=few_shape.warps, num_stages=few_shape.stages,
    )  # fmt: skip


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys, positions: int, n_keys: int, kernels: Any
) -> bool:
    """Whether ``prefill`` takes the call: the copy engine can read K and V, and a tile's rows have splits of one length."""
    others = (keys.added, keys.starts, keys.lengths, keys.table, keys.sinks)
    if any(t is not None for t in others) or keys.window or q.dtype is torch.float32:
        return False
    if max(q.shape[3], v.shape[3]) > 128 or n_keys == 0 or (keys.causal and keys.shift < 0):
        return False
    for t in (k, v):
        if t.data_ptr() % 16 or any(s % 8 or s == 0 for s, n in zip(t.stride()[:3], t.shape, strict=False) if n > 1):
            return False
    if not keys.causal:
        return True
    longer = kernels.least * kernels.most
    while longer < n_keys:
        at = longer - keys.shift  # the first row whose splits are longer
        if 0 < at < q.shape[2] and at % positions:
            return False
        longer *= 2
    return True


def _described(t: torch.Tensor, kernels: Any) -> Any:
    """K or V for the copy engine: blocks of keys of one head."""
    width = t.shape[3]
    strides = [s if n > 1 else -(-width // 8) * 8 for s, n in zip(t.stride()[:3], t.shape, strict=False)]
    return kernels.descriptor(t, list(t.shape), [*strides, 1], [1, 1, kernels.block, _padded(width)])


def _spans(mask: torch.Tensor, causal: bool, shift: int) -> Span:
    """(first unmasked key, one past the last, whether there is more to know) of the mask's rows, each row once."""
    batch, heads, queries, keys = mask.shape
    distinct = (
        1 if mask.stride(0) == 0 else batch,
        1 if mask.stride(1) == 0 else heads,
        1 if mask.stride(2) == 0 and not causal else queries,
    )
    first, end, holes = torch.empty((3, *distinct), dtype=torch.int32, device=mask.device)
    kind = 1 if mask.dtype is torch.bool else 2
    seen = mask.view(torch.uint8) if kind == 1 else mask
    _kernels().spans[(math.prod(distinct),)](
        seen, first, end, holes, keys, shift, distinct[1], distinct[2], *mask.stride(), KIND=kind, CAUSAL=causal
    )
    return first, end, holes


class _Counters:
    """Integers that are zero whenever no launch is running: the last program of its rows puts its own back.

    Launches of one stream follow each other and share theirs. A captured launch may be replayed beside anything, so it
    keeps its own for good: from a reserve made before, or zeroed inside the graph.
    """

    def __init__(self) -> None:
        self._of_stream: dict[tuple[int, int], torch.Tensor] = {}
        self._reserve: dict[int, tuple[torch.Tensor, int]] = {}

    def take(self, count: int, device: torch.device) -> torch.Tensor:
        index = device.index if device.index is not None else torch.cuda.current_device()
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            reserve, used = self._reserve.get(index, (None, 0))
            if reserve is None or used + count > reserve.numel():
                return torch.zeros(count, dtype=torch.int32, device=device)
            self._reserve[index] = (reserve, used + count)
            return reserve[used : used + count]
        found, used = self._reserve.get(index, (None, 0))
        if found is None or used * 2 > found.numel():
            self._reserve[index] = (torch.zeros(1 << 20, dtype=torch.int32, device=device), 0)
        key = (index, torch.cuda.current_stream(device).cuda_stream)
        own = self._of_stream.get(key)
        if own is None or own.numel() < count:
            own = self._of_stream[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        return own


_counters = _Counters()


def _workspace(device: torch.device, programs: int, splits: int, rows: int, width: int) -> tuple[torch.Tensor, ...]:
    """Where the splits of a launch leave (maximum, sum, values), and the counts of those that did."""
    count = programs * splits * rows
    space = torch.empty(count * (width + 2), dtype=torch.float32, device=device)
    outs, tops, totals = (
        space[: count * width],
        space[count * width : count * (width + 1)],
        space[count * (width + 1) :],
    )
    return tops, totals, outs, _counters.take(programs, device)


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
    _kernels().plain[(batch * heads * queries,)](
        q, k, v, out, added, first, end, q if sinks is None else sinks, heads, queries, keys, heads // key.shape[1],
        scale * _LOG2E, D=depth, DV=value_depth, DP=_padded(depth), DVP=_padded(value_depth), SINK=sinks is not None,
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
