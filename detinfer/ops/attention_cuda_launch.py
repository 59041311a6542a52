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
from detinfer.ops.attention_cuda_workspace import workspace
from detinfer.ops.attention_deal import BY_RULE, Deal, by_rule, chip, whole_from

WIDEST = 256
"""Greatest depth of a head."""

LOG2E = math.log2(math.e)
_SCANNED = 16384  # a mask up to here is read by the decode kernel itself
_LEAST_SCALE = 2.0**-100  # of ``prefill``, where a masked score times the scale has to stay -inf
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


@dataclass(slots=True)
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
    return Shape(_FEW_ROWS, 2 if depth <= 128 else 4, 2)


def _power(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << (count - 1).bit_length()


def padded(depth: int) -> int:
    """Columns of a tile for heads of ``depth``: the rest are zeros, whose products change no sum.

    64 at least: in narrower tiles the ptxas that comes with Triton 3.6 (12.8) lost half of a matrix descriptor, so that the
    unit read keys from anywhere in shared memory.
    """
    return max(64, _power(depth))


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Keys,
    scale: float | None,
    stride: tuple[int, ...] | None,
    want_lse: bool,
    path: str | None = None,
    deal: Deal = BY_RULE,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, H, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv] (a paged cache: [pages, Hkv, page, D]) with contiguous rows.

    ``stride`` is the result's, contiguous unless given. ``path`` holds the call to ``tiles``, ``prefill`` or ``decode``,
    ``deal`` decode to its numbers.
    """
    _check_devices(q, k, v, keys)
    q, k, v = (t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    scale = 1.0 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale
    if scale < 0:
        q, scale = -q, -scale
    return plan(q, k, v, keys, scale, stride, want_lse, path, deal).start(q, k, v, keys)


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Keys,
    scale: float,
    stride: tuple[int, ...] | None,
    want_lse: bool,
    path: str | None = None,
    deal: Deal = BY_RULE,
) -> Launch:
    """The launch for tensors of these shapes, strides and dtypes, at addresses that are multiples of 16."""
    depth, value_depth = q.shape[3], v.shape[3]
    if max(depth, value_depth) > WIDEST:
        raise RefusedError(
            f"{NAME}: a depth of {max(depth, value_depth)} is more than the {WIDEST} that the kernels take"
        )
    shape = (*q.shape[:3], value_depth)
    if stride is None:
        stride = (math.prod(shape[1:]), math.prod(shape[2:]), value_depth, 1)
    n_keys = k.shape[2] if keys.table is None else k.shape[2] * keys.table.shape[1]
    launch = Launch("nothing", shape, stride, q.dtype, want_lse)
    if math.prod(shape) and n_keys:
        if k.shape[1] > 1 and k.stride(1) == 0 and v.stride(1) == 0:
            k, v = k[:, :1], v[:, :1]  # one head, shown many times
        _cut(launch, q, k, v, keys, torch.tensor(scale, dtype=torch.float32).item() * LOG2E, n_keys, path, deal)
    return launch


def _check_devices(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys) -> None:
    given = [t for t in (q, k, v, keys.added, keys.sinks) if t is not None]
    if q.device.type != "cuda" or any(t.device != q.device for t in given):
        raise UsageError(f"{NAME}: tensors on {[str(t.device) for t in given]}; they must lie on one GPU")
    if keys.sinks is not None and (keys.sinks.shape != q.shape[1:2] or not keys.sinks.is_contiguous()):
        raise UsageError(f"{NAME}: sinks are {list(keys.sinks.shape)}; they must be [{q.shape[1]}], contiguous")


class Launch:
    """Everything about a call but its tensors: made once for a set of shapes, strides, dtypes and options."""

    def __init__(
        self, kernel: str, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, want_lse: bool
    ) -> None:
        self.kernel = kernel
        self.shape, self.stride, self.dtype, self.want_lse = shape, stride, dtype, want_lse
        self.grid = (0, 0)
        self.numbers: tuple[float, ...] = ()
        self.constants: dict[str, Any] = {}
        self.span: tuple[Any, ...] | None = None
        """What ``_spans`` takes besides the mask, where the kernel does not look at the mask's rows itself."""
        self.work = (0, 0, 0, 0)
        self.tiles: tuple[list[Any], ...] = ()
        """For the copy engine: shape, strides and block of K and of V."""
        self.compiled: tuple[Any, tuple[Any, ...]] | None = None
        """What Triton made of the kernel for these arguments at the first start, and the constants in their order."""
        self.code = ""
        """Triton's hash of that machine code."""
        self.checked = False
        """Whether the machine code is known to keep the order: asked at the first start."""

    def start(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the result, its log-sum-exp if it was asked for)."""
        if q.device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(q.device):
                return self._start(q, k, v, keys)
        return self._start(q, k, v, keys)

    def _start(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=q.device)
        lse = torch.empty(self.shape[:3], dtype=torch.float32, device=q.device) if self.want_lse else None
        if self.kernel == "nothing":
            return out.zero_(), lse if lse is None else lse.fill_(-math.inf)
        kernels = kernels_of_triton()
        to_lse = q if lse is None else lse  # q: a pointer that is not followed
        if self.tiles:
            described = [kernels.descriptor(t, *how) for t, how in zip((k, v), self.tiles, strict=True)]
            self._run(kernels.prefill, (q, k, v, *described, out, to_lse))
            self._prove(q, k, v, keys)
            return out, lse
        mask = keys.added
        if mask is not None and mask.dtype is torch.bool:
            mask = mask.view(torch.uint8)
        span: tuple[Any, ...] = (q, q, q)
        if self.span is not None:
            span = _spans(mask, *self.span)
        sinks, table, lengths, starts, mask = (
            q if t is None else t for t in (keys.sinks, keys.table, keys.lengths, keys.starts, mask)
        )
        pointers = (q, k, v, out, to_lse, sinks, table, lengths, starts, *span, mask)
        if self.kernel == "tiles":
            self._run(kernels.tiles, pointers)
        else:
            self._run(kernels.decode, (*pointers, *workspace(out, *self.work)))
        self._prove(q, k, v, keys)
        return out, lse

    def _prove(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys) -> None:
        """Raise unless the machine code gives the plain kernel's bytes: before its first result is handed out."""
        if not self.checked and self.compiled is not None:
            from detinfer.ops import attention_cuda_variants

            attention_cuda_variants.check(self, self.code, q, k, v, keys)
            self.checked = True

    def _run(self, kernel: Any, tensors: tuple[Any, ...]) -> None:
        """Start ``kernel``. Only the first time is Triton asked which machine code these arguments need: the answer takes
        tens of microseconds and follows from dtypes, alignments and numbers, which are the launch's own."""
        if self.compiled is None:
            made = kernel[self.grid](*tensors, *self.numbers, **self.constants)
            if made is not None:
                constants = tuple(self.constants[name] for name in kernel.arg_names if name in self.constants)
                grid = (*self.grid, 1)
                self.compiled, self.code = (made[grid], constants), made.hash
            return
        start, constants = self.compiled
        stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        start(*tensors, *self.numbers, *constants, stream=stream)


def _cut(
    launch: Launch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Keys,
    c: float,
    n_keys: int,
    path: str | None,
    deal: Deal,
) -> None:
    """Choose the kernel of ``launch`` and how it is cut."""
    kernels = kernels_of_triton()
    (batch, heads, queries, depth), kv_heads, value_depth = q.shape, k.shape[1], v.shape[3]
    group, share, mask = heads // kv_heads, 1, keys.added
    deepest = max(depth, value_depth)
    # Rows that all see the same keys may share a program of the decode kernel.
    alike = queries == 1 or (not keys.causal and (mask is None or mask.stride(2) == 0))
    if group > 64:
        group, share, kv_heads = 1, group, heads
    positions = max(1, min(queries, _FEW_ROWS // group)) if alike else 1
    shape, large, few_shape = _tile(deepest, q.dtype), _large(deepest, q.dtype), _few(deepest, q.dtype)
    rows, wide = max(shape.rows, _power(group)), max(large.rows, _power(group))
    few = -(-queries // positions)
    tiles = -(-queries // (rows // group)) * batch * kv_heads
    if path is None and (queries == 1 or few == 1 or (few <= 8 and tiles < 64 and n_keys >= 4 * kernels.least)):
        path = "decode"
    if path is None and c >= _LEAST_SCALE and _plain(q, k, v, keys, wide // group, n_keys, kernels):
        path = "prefill"
    if path == "decode" and mask is not None and heads > 1 and mask.stride(1) != 0 and group > 1:
        group, share, kv_heads = 1, group, heads  # each head has a mask of its own
        positions = max(1, min(queries, _FEW_ROWS)) if alike else 1
        few = -(-queries // positions)
    launch.kernel = path or "tiles"
    launch.constants = {
        "G": group, "SHARE": share, "D": depth, "DV": value_depth, "DP": padded(depth), "DVP": padded(value_depth),
        "CAUSAL": keys.causal, "WANT_LSE": launch.want_lse, "enable_fp_fusion": False,
    }  # fmt: skip
    if launch.kernel == "prefill":
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *launch.stride[:3])
        launch.grid = (-(-queries // (wide // group)), batch * kv_heads)
        launch.numbers = (kv_heads, heads, queries, n_keys, keys.shift, 0, c, *strides)
        launch.constants |= {"BM": wide, "num_warps": large.warps, "num_stages": large.stages}
        launch.tiles = (_described(k, kernels.block), _described(v, kernels.block))
        return
    scan = launch.kernel == "decode" and mask is not None and n_keys <= _SCANNED
    spread: tuple[int, ...] = (0, 0, 0)
    if mask is not None and not scan:
        distinct = (
            1 if mask.stride(0) == 0 else batch,
            1 if mask.stride(1) == 0 else heads,
            1 if mask.stride(2) == 0 and not keys.causal else queries,
        )
        launch.span = (distinct, n_keys, mask.stride(), keys.causal, keys.shift)
        full = (distinct[1] * distinct[2], distinct[2], 1)
        spread = tuple(0 if n == 1 else s for n, s in zip(distinct, full, strict=True))
    paged = keys.table is not None
    # The batch of a paged cache is in its table, and its pages are where another cache has its batch.
    kv = [(0 if paged else t.stride(0), t.stride(1), t.stride(2), t.stride(0)) for t in (k, v)]
    table_b = keys.table.stride(0) if keys.table is not None else 0
    bias = (0, 0, 0, 0) if mask is None else mask.stride()
    strides = (*q.stride()[:3], *kv[0], *kv[1], *launch.stride[:3], table_b, *spread, *bias)
    launch.numbers = (kv_heads, heads, queries, n_keys, keys.shift, keys.window, c, *strides)
    launch.constants |= {
        "PAGE": k.shape[2] if paged else 0, "WINDOW": keys.window > 0, "SPANS": launch.span is not None,
        "MASK": 0 if mask is None else 1 if mask.dtype is torch.bool else 2, "STARTED": keys.starts is not None,
        "COUNTED": keys.lengths is not None, "SINK": keys.sinks is not None,
    }  # fmt: skip
    if launch.kernel == "tiles":
        launch.grid = (-(-queries // (rows // group)), batch * kv_heads)
        launch.constants |= {"BM": rows, "num_warps": shape.warps, "num_stages": shape.stages}
        return
    longest = kernels.least << 9  # where the kernels' _split_length ends: beyond it a row has more splits
    programs = batch * kv_heads * few
    splits = max(min(kernels.most, -(-n_keys // kernels.least)), -(-n_keys // longest))
    each, several, whole, stages = min(deal.each, splits), deal.each > 1, deal.whole, few_shape.stages
    if not deal.each and q.dtype is torch.float32:
        each = 1  # its products leave no register for more
    elif not deal.each:
        # Tiles of more rows need more shared memory.
        measured = deepest <= 128 and group * positions <= _FEW_ROWS and torch.version.hip is None
        fewest = whole_from(mask is not None or keys.starts is not None, keys.lengths is not None)
        each, several, whole, stages = by_rule(programs, splits, kernels.most, chip(q.device), stages, measured, fewest)
    if whole:
        each, several, splits = 1, False, 1
    pieces = -(-splits // each)
    launch.grid = (pieces, programs)
    launch.work = (programs, pieces * each, group * positions, padded(value_depth))
    launch.numbers = (*launch.numbers[:7], each, *launch.numbers[7:])
    of_tile = max(few_shape.rows, _power(group * positions))
    warps = few_shape.warps if of_tile < 64 else max(few_shape.warps, 4)  # two would keep their sums in local memory
    launch.constants |= {
        "BM": of_tile, "POSITIONS": positions, "SCAN": scan, "SEVERAL": several, "WHOLE": whole,
        "num_warps": deal.warps or warps, "num_stages": deal.stages or stages,
    }  # fmt: skip


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


def _described(t: torch.Tensor, block: int) -> list[Any]:
    """K or V for the copy engine, in blocks of keys of one head: shape, strides, block."""
    width = t.shape[3]
    strides = [s if n > 1 else -(-width // 8) * 8 for s, n in zip(t.stride()[:3], t.shape, strict=False)]
    return [list(t.shape), [*strides, 1], [1, 1, block, padded(width)]]


def _spans(
    mask: Any, distinct: tuple[int, int, int], n_keys: int, strides: tuple[int, ...], causal: bool, shift: int
) -> Span:
    """(first unmasked key, one past the last, whether there is more to know) of the mask's rows, each row once."""
    first, end, holes = torch.empty((3, *distinct), dtype=torch.int32, device=mask.device)
    kind = 1 if mask.dtype is torch.uint8 else 2
    kernels_of_triton().spans[(math.prod(distinct),)](
        mask, first, end, holes, n_keys, shift, distinct[1], distinct[2], *strides, KIND=kind, CAUSAL=causal
    )
    return first, end, holes
