"""Mixture of experts on NVIDIA GPUs: top-k, products of many experts in one launch, and the sum over a token's experts.

The order is that of ``detinfer/ops/moe.py`` with products as csrc/moe_gpu.h has them: bf16 and fp16 on the matrix unit, one
accumulator over k, so that the bits are a GPU's and not the CPU's. They run on csrc's tiles or, where there are many tokens, on
``matmul_wide``, with the same bytes. What is not a product (top-k, the sum over places) has the CPU's bits. Nothing depends
on how many tokens an expert got, no call but the first of a kind of ``wide`` waits for the device, none allocates outside
torch: all of it runs inside the capture of a CUDA graph. fp32 runs as the composed form does, one expert after another.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch

from detinfer import native
from detinfer.errors import NativeError, RefusedError, UnsupportedDtype, UsageError
from detinfer.ops import matmul_wide
from detinfer.ops.moe import Experts, take

HALVES = (torch.bfloat16, torch.float16)
TILE_ROWS = (16, 32, 64, 128)
"""Tokens of a block, any of which gives the same bits."""

MOST_EXPERTS = MOST_CHOICES = 1024
PATHS = {"reference": 0, "tile": 1}
"""csrc's paths and their codes; beside them there is ``wide``, of ``matmul_wide``."""

WIDE_EACH, WIDE_LARGE = 4, 64
"""Assignments per expert from which ``wide`` runs, and from which its tiles have 128 rows: as it was measured on an H200,
where it was the faster path at every size tried, the least of them 128 assignments and 4 per expert."""

_group = struct.Struct("@3Pq2i")  # GpuMoeGroup of csrc/moe_gpu.h, and so on
_product = struct.Struct("@4i10q7P")
_combine = struct.Struct("@4i3q5P")
_top_k = struct.Struct("@4i2q3P")


@functools.cache
def _functions() -> tuple[dict[str, Callable[[bytes, int], int]], Any]:
    handle = native.gpu_library()
    wanted = sum(layout.size for layout in (_group, _product, _combine, _top_k))
    if (found := handle.detinfer_gpu_moe_size()) != wanted:
        raise NativeError(f"the GPU library's moe takes {found} bytes, this detinfer gives {wanted}: reinstall it")
    handle.detinfer_gpu_moe_error.restype = ctypes.c_char_p
    functions = {name: getattr(handle, f"detinfer_gpu_moe_{name}") for name in ("group", "product", "combine", "top_k")}
    for function in functions.values():
        function.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    return functions, handle.detinfer_gpu_moe_error


def _run(name: str, args: bytes, device: torch.device) -> None:
    functions, error = _functions()
    index = torch._C._cuda_getDevice() if device.index is None else device.index
    with torch.cuda.device(index):
        status = functions[name](args, torch._C._cuda_getCurrentRawStream(index))
    if status:
        raise NativeError((error() or b"").decode())


def _pointer(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class Groups:
    """The assignments of [tokens, k] chosen experts, sorted by expert and cut into tiles; one launch."""

    def __init__(self, chosen: torch.Tensor, experts: int, tile_rows: int | None = None) -> None:
        if experts > MOST_EXPERTS:
            raise RefusedError(f"a layer of {experts} experts: the GPU's path takes {MOST_EXPERTS} at most")
        count = chosen.numel()
        self.chosen, self.places = chosen.to(torch.int64).contiguous(), chosen.shape[1]
        self.tile_rows = tile_rows or _tile_rows(count, experts)
        self.most_tiles = min(count, experts) + count // self.tile_rows
        self.order = torch.empty(count, dtype=torch.int32, device=chosen.device)
        self.tiles = torch.empty(1 + 3 * self.most_tiles, dtype=torch.int32, device=chosen.device)
        pointers = (t.data_ptr() for t in (self.chosen, self.order, self.tiles))
        _run("group", _group.pack(*pointers, count, experts, self.tile_rows), chosen.device)


def _each(assignments: int, experts: int) -> int:
    """Assignments per expert, if they are spread evenly: what both rules look at, since the true counts are on the device."""
    return assignments // max(min(experts, assignments), 1)


def _tile_rows(assignments: int, experts: int) -> int:
    each = _each(assignments, experts)
    return next((rows for rows in TILE_ROWS if each <= rows), TILE_ROWS[-1])


def wide_rows(assignments: int, experts: int) -> int:
    """Rows of the tiles of ``wide`` for so many assignments; 0 where csrc's tiles are to run."""
    each = _each(assignments, experts)
    if assignments < matmul_wide.LEAST_ROWS or each < WIDE_EACH:
        return 0
    return matmul_wide.ROWS[each >= WIDE_LARGE]


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    groups: Groups | None = None,
    *,
    unrounded: bool = False,
    places: int = 1,
    path: str | None = None,
) -> torch.Tensor:
    """x [tokens, K] times the assigned experts' weights [experts, N, K] (any strides): [assignments, N].

    Row a of the result is token a / ``places`` times its expert, plus the bias [experts, N]; in the dtype of x, or fp32
    if ``unrounded``. Without ``groups`` all rows go to expert 0. ``path`` holds the product to ``reference``, ``tile`` or
    ``wide``, proved or not; left out, ``wide`` runs in tiles that it takes, where its code is proved. Raises UnsupportedDtype
    for other dtypes than bf16 and fp16 and UsageError for shapes.
    """
    if x.dtype not in HALVES or weight.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype):
        raise UnsupportedDtype(
            f"experts on a GPU: {x.dtype} and {weight.dtype}; the matrix unit takes bf16 or fp16, alike"
        )
    (tokens, k), (_, n, depth) = x.shape, weight.shape
    if k != depth or (bias is not None and bias.shape != weight.shape[:2]):
        raise UsageError(f"experts: x is {list(x.shape)}, the weights {list(weight.shape)}: the last dimensions differ")
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    rows = tokens * places
    out = torch.empty((rows, n), dtype=torch.float32 if unrounded else x.dtype, device=x.device)
    most = 0 if groups is None else groups.most_tiles
    chosen, order, tiles = (None, None, None) if groups is None else (groups.chosen, groups.order, groups.tiles)
    tile_rows = _tile_rows(rows, 1) if groups is None else groups.tile_rows
    if path == "wide":
        large = tile_rows if groups is not None else matmul_wide.ROWS[-1]
        matmul_wide.held(x, weight, bias, order, tiles, out, places, (large, matmul_wide.COLUMNS), most)
        return out
    large = wide_rows(rows, 1) if groups is None else tile_rows
    if path is None and large in matmul_wide.ROWS and rows and n:
        tile = (large, matmul_wide.COLUMNS)
        code = matmul_wide.find(x, weight, bias, out.dtype, tile, groups is not None)
        if code is not None:
            at = (x.data_ptr(), weight.data_ptr(), *map(_pointer, (bias, order, tiles, out)))
            numbers = (rows, places, n, k, x.stride(0), *weight.stride())
            with torch.cuda.device(x.device):
                code.start(at, numbers, torch._C._cuda_getCurrentRawStream(x.device.index), most)
            return out
    args = _product.pack(
        *(native.DTYPES[x.dtype], PATHS[path or "tile"], tile_rows, unrounded, rows, places, n, k, most),
        *(x.stride(0), *weight.stride(), n, x.data_ptr(), weight.data_ptr(), _pointer(bias)),
        *(_pointer(chosen), _pointer(order), _pointer(tiles), out.data_ptr()),
    )
    _run("product", args, x.device)
    return out


def combine(
    chosen: torch.Tensor,
    weights: torch.Tensor,
    found: torch.Tensor,
    experts: int,
    dtype: torch.dtype,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """weights [tokens, k] times fp32 [tokens, k, width] in order of place, plus fp32 ``shared``: [tokens, width]."""
    tokens, places, width = found.shape
    weights, found = weights.contiguous(), found.contiguous()
    shared = None if shared is None else shared.contiguous()
    out = torch.empty((tokens, width), dtype=dtype, device=found.device)
    codes = native.DTYPES[dtype], native.DTYPES[weights.dtype]
    pointers = (_pointer(t) for t in (chosen, weights, found, shared, out))
    _run("combine", _combine.pack(*codes, experts, 0, tokens, places, width, *pointers), found.device)
    return out


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    layer: Experts,
    shared: torch.Tensor | None = None,
    *,
    tile_rows: int | None = None,
    path: str | None = None,
) -> torch.Tensor:
    """``moe.experts`` in bf16 or fp16 on a GPU; ``tile_rows`` and ``path`` hold it to a kernel: for tests. Which one runs
    follows from shapes and layouts alone, and from whether a graph is captured before ``wide`` was proved for them.

    An expert outside of 0 .. experts - 1 makes its token NaN. Raises RefusedError for more than 1,024 experts.
    """
    if not len(x):
        return torch.empty((0, layer.down.shape[1 if not layer.transposed else 2]), dtype=x.dtype, device=x.device)
    up, down = (w.mT if layer.transposed else w for w in (layer.up, layer.down))
    large = wide_rows(chosen.numel(), len(up))
    if path == "wide":
        tile_rows = tile_rows or large or matmul_wide.ROWS[-1]
    elif path is None and tile_rows is None and large and matmul_wide.available(x.device.index):
        tile_rows = large if matmul_wide.takes(up) and matmul_wide.takes(down) else None
    groups = Groups(chosen, len(up), tile_rows)
    inner = layer.gate(product(x, up, layer.up_bias, groups, places=groups.places, path=path))
    found = product(inner, down, layer.down_bias, groups, unrounded=True, path=path)
    found = found.view(*groups.chosen.shape, found.shape[1])
    return combine(groups.chosen, weights, found, len(up), x.dtype, shared)


def topk(self: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """aten::topk: ``moe.topk`` on a GPU. Rows of more than 1,024 elements are sorted by torch, which keeps ties in place."""
    if not self.dim() or not self.is_floating_point() or k > self.shape[dim] or k < 0:
        return NotImplemented
    native.dtype_code(self.dtype, "aten::topk")
    n = self.shape[dim]
    if n > MOST_CHOICES or not self.numel():
        indices = torch.sort(self, dim=dim, descending=largest, stable=True)[1].narrow(dim, 0, k).contiguous()
        return take(self, dim, indices), indices
    last = self.movedim(dim, -1)
    rows = last.reshape(-1, n) if last.is_contiguous() else last.contiguous().view(-1, n)
    values = torch.empty((*last.shape[:-1], k), dtype=self.dtype, device=self.device)
    found = torch.empty(values.shape, dtype=torch.int64, device=self.device)
    sizes = native.DTYPES[self.dtype], k, largest, n, len(rows), rows.stride(0)
    _run("top_k", _top_k.pack(*sizes, rows.data_ptr(), values.data_ptr(), found.data_ptr()), self.device)
    return values.movedim(-1, dim).contiguous(), found.movedim(-1, dim).contiguous()


COVERED: dict[str, Callable[..., Any]] = {"aten::topk": topk}
"""Operations that this family computes on a GPU, each with its function."""

REDUCES: frozenset[str] = frozenset()
"""None of them contains a sum."""


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare ``topk`` with the reference; (results compared, their bytes), or Diverged."""
    from detinfer.ops import moe_cuda_proof

    native.dtype_code(dtype, op)
    return moe_cuda_proof.prove_topk(op, dtype, COVERED[op])
