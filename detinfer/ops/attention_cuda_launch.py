"""How a call of attention on a GPU becomes a launch: which kernel, how it is cut, where its splits meet."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from detinfer.errors import NativeError, RefusedError, UsageError
from detinfer.ops.attention import NAME

WIDEST = 256
"""Greatest depth of a head."""

LOG2E = math.log2(math.e)
_SCANNED = 16384  # a mask up to here is read by the decode kernel itself
_FEW_ROWS = 16  # the least rows of a tile on the matrix unit
Span = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@functools.cache
def kernels_of_triton() -> Any:
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
    return Shape(64, 4, 3)


def _few(depth: int, dtype: torch.dtype) -> Shape:
    if dtype is torch.float32:
        return Shape(_FEW_ROWS, 4, 1)
    return Shape(_FEW_ROWS, 2, 3) if depth <= 128 else Shape(_FEW_ROWS, 4, 2)


def _power(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << (count - 1).bit_length()


def padded(depth: int) -> int:
    return max(16, _power(depth))


def run(
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
        _launch(q, k, v, out, lse, keys, scale * LOG2E, n_keys, page, path)
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
    kernels = kernels_of_triton()
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
    rows = max(shape.rows, _power(group))
    few = -(-queries // positions)
    tiles = -(-queries // (rows // group)) * batch * kv_heads
    least, most = kernels.least, kernels.most
    if path is None and (queries == 1 or few == 1 or (few <= 8 and tiles < 64 and n_keys >= 4 * least)):
        path = "decode"
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
        "G": group, "SHARE": share, "D": depth, "DV": value_depth, "DP": padded(depth), "DVP": padded(value_depth),
        "PAGE": page, "CAUSAL": keys.causal, "WINDOW": keys.window > 0, "SPANS": span is not None, "MASK": mask_kind,
        "STARTED": keys.starts is not None, "COUNTED": keys.lengths is not None, "SINK": keys.sinks is not None,
        "WANT_LSE": lse is not None, "enable_fp_fusion": False,
    }  # fmt: skip
    large = _large(max(depth, value_depth), q.dtype)
    wide = max(large.rows, _power(group))
    if path == "prefill" or (path is None and _plain(q, k, v, keys, wide // group, n_keys, kernels)):
        grid = (-(-queries // (wide // group)), batch * kv_heads)
        kernels.prefill[grid](
            *(q, k, v, _described(k, kernels), _described(v, kernels), out, none if lse is None else lse),
            *(kv_heads, heads, queries, n_keys, keys.shift, 0, c),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
            G=group, SHARE=share, D=depth, DV=value_depth, DP=padded(depth), DVP=padded(value_depth), BM=wide,
            CAUSAL=keys.causal, WANT_LSE=lse is not None, num_warps=large.warps, num_stages=large.stages,
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
    tile_rows = max(few_shape.rows, _power(group * positions))
    programs, splits = batch * kv_heads * few, min(most, -(-n_keys // least)) if n_keys else 1
    parts = _workspace(q.device, programs, splits, group * positions, padded(value_depth))
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
    return kernels.descriptor(t, list(t.shape), [*strides, 1], [1, 1, kernels.block, padded(width)])


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
    kernels_of_triton().spans[(math.prod(distinct),)](
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
