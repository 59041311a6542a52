"""Reductions along rows on NVIDIA GPUs: the operations of ``rows``, with the same bytes as on CPU.

A row's bits depend on that row alone: row_sum's order comes from the row's length, exp and log are the written-out ones
of ``detinfer/reference/elementwise.py``. Inputs are fp32, bf16 or fp16 on one CUDA device. Rows may lie apart (a slice
of a wider tensor); any other layout is copied first. Calls may be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from detinfer import native
from detinfer.errors import NativeError, UsageError
from detinfer.ops import rows, rows_cuda_proof
from detinfer.ops.rows import OPS, RESIDUAL_MODES, WEIGHT_MODES, ResidualMode, WeightMode
from detinfer.ops.rows_forms import Forms

_args = struct.Struct("@7i5q8Pd")  # GpuRowsArgs of csrc/rows_gpu.h
_pack = _args.pack
_DTYPES = native.DTYPES

# In the order of csrc/rows_gpu.h.
SHAPES = (
    *(
        "chosen",
        "any_warp",
        "any_block",
        "part_of_warp",
        "few_threads",
        "warp",
        "block_1024",
        "block_2048",
        "block_4096",
    ),
    *("block_8192", "many_threads", "block_16384", "stream", "stream_wide", "cluster"),
)
"""Shapes of the threads that take a row; which one runs is a matter of speed."""

_shape = 0


@contextmanager
def hold_shape(name: str) -> Iterator[None]:
    """Run norms and softmax in one shape inside the block (for the whole process); bits stay the same.

    NativeError, from the call, where the shape cannot take the rows.
    """
    global _shape
    before, _shape = _shape, SHAPES.index(name)
    try:
        yield
    finally:
        _shape = before


@functools.cache
def _function() -> tuple[Callable[[bytes, int], int], Any]:
    handle = native.gpu_library()
    if (found := handle.detinfer_gpu_rows_size()) != _args.size:
        raise NativeError(f"the GPU library's rows takes {found} bytes, this detinfer gives {_args.size}: reinstall it")
    handle.detinfer_gpu_rows_error.restype = ctypes.c_char_p
    handle.detinfer_gpu_rows.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    return handle.detinfer_gpu_rows, handle.detinfer_gpu_rows_error


def _run(args: bytes, device: torch.device) -> None:
    run, error = _function()
    index = device.index
    if index == torch._C._cuda_getDevice():
        status = run(args, torch._C._cuda_getCurrentRawStream(index))
    else:
        with torch.cuda.device(device):
            status = run(args, torch._C._cuda_getCurrentRawStream(index))
    if status:
        raise NativeError((error() or b"").decode())


_heads: dict[tuple[Any, ...], Any] = {}
_KEPT = 4096


def _keep(signature: tuple[Any, ...], value: Any) -> None:
    # What a call needs besides its pointers, for inputs that are read where they lie: eager decoding is bound by the host.
    if len(_heads) >= _KEPT:
        _heads.clear()
    _heads[signature] = value


def _spaced(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(x or a copy of it, elements from one row to the next): rows of the last dimension, each contiguous."""
    if x.is_contiguous():
        return x, x.shape[-1] if x.dim() else 1
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        wanted = None
        for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
            if size == 1:
                continue
            if wanted is None:
                found = wanted = stride
            if stride != wanted or stride < x.shape[-1]:
                break
            wanted *= size
        else:
            return x, x.shape[-1] if wanted is None else found
    return x.contiguous(), x.shape[-1]


def _pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _layout(x: torch.Tensor | None) -> Any:
    return None if x is None else (x.dtype, x.shape, x.stride(), x.device)


def _reduce(
    op: str, self: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None
) -> Any:
    signature = (
        op,
        self.dtype,
        self.shape,
        self.stride(),
        tuple(dim) if isinstance(dim, list) else dim,
        keepdim,
        dtype,
    )
    if (kept := _heads.get(signature)) is not None:
        head, shape, out_dtype = kept
        out = torch.empty(shape, dtype=out_dtype, device=self.device)
        _run(_pack(*head, self.data_ptr(), 0, 0, 0, out.data_ptr(), 0, 0, 0, 0.0), self.device)
        return out
    wanted = dtype or self.dtype
    if not (wanted.is_floating_point or wanted.is_complex):
        return NotImplemented
    where = f"aten::{op}"
    x, out_dtype = rows.ready(self, dtype, where)
    ndim = x.dim()
    reduced = rows.dimensions(dim, ndim) if ndim else []
    left = [d for d in range(ndim) if d not in reduced]
    sizes = x.shape
    shape = [1 if d in reduced else sizes[d] for d in range(ndim)] if keepdim else [sizes[d] for d in left]
    n = math.prod(sizes[d] for d in reduced)
    if n == 0 and op in ("max", "min"):
        raise IndexError(f"{where}: no elements to choose from in dimensions {reduced} of {list(sizes)}")
    inner, step = 1, n
    if left and reduced and reduced[0] < left[-1]:
        if reduced[-1] - reduced[0] == len(reduced) - 1:  # neighbours: the kernel steps over what follows them
            inner = math.prod(sizes[reduced[-1] + 1 :])
        else:
            x = x.permute(left + reduced)
        x = x.contiguous()
    elif len(reduced) == 1:
        x, step = _spaced(x)
    else:
        x = x.contiguous()
    out = torch.empty(shape, dtype=out_dtype, device=x.device)
    head = (OPS[op], _DTYPES[x.dtype], _DTYPES[out_dtype], 0, 0, 0, 0, out.numel(), n, inner, step, 0)
    if x.data_ptr() == self.data_ptr():  # a copy must be made in every call
        _keep(signature, (head, shape, out_dtype))
    _run(_pack(*head, x.data_ptr(), 0, 0, 0, out.data_ptr(), 0, 0, 0, 0.0), x.device)
    return out


def _softmax_of(op: str, self: torch.Tensor, dim: int, dtype: torch.dtype | None) -> Any:
    signature = (op, self.dtype, self.shape, self.stride(), dim, dtype, _shape)
    if (kept := _heads.get(signature)) is not None:
        head, out_dtype = kept
        out = torch.empty_like(self, dtype=out_dtype, memory_format=torch.contiguous_format)
        _run(_pack(*head, self.data_ptr(), 0, 0, 0, out.data_ptr(), 0, 0, 0, 0.0), self.device)
        return out
    if not (self.is_floating_point() or self.is_complex()) and dtype is None:
        return NotImplemented
    x, out_dtype = rows.ready(self, dtype, f"aten::{op}")
    (d,) = rows.dimensions(dim, x.dim())
    last = d >= x.dim() - 1
    x, step = _spaced(x if last else x.movedim(d, -1))
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    n = x.shape[-1] if x.dim() else 1
    sizes = (x.numel() // max(n, 1), n, 1, step, 0)
    head = (OPS[op], _DTYPES[x.dtype], _DTYPES[out_dtype], 0, 0, 0, _shape, *sizes)
    if last and x.data_ptr() == self.data_ptr():
        _keep(signature, (head, out_dtype))
    _run(_pack(*head, x.data_ptr(), 0, 0, 0, out.data_ptr(), 0, 0, 0, 0.0), x.device)
    return out if last else out.movedim(-1, d).contiguous()


_forms = Forms(_reduce, _softmax_of)
sum_all, sum_dims, mean_all, mean_dims = _forms.sum_all, _forms.sum_dims, _forms.mean_all, _forms.mean_dims
amax, amin, max_all, min_all = _forms.amax, _forms.amin, _forms.max_all, _forms.min_all
softmax, log_softmax = _forms.softmax, _forms.log_softmax
softmax_core, log_softmax_core = _forms.softmax_core, _forms.log_softmax_core


def _norm(
    op: str,
    x: torch.Tensor,
    size: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    flat: int = 1,
    mode: int = WEIGHT_MODES["fp32"],
    residual: torch.Tensor | None = None,
    residual_mode: int = 0,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(norm, residual_out) of rows of ``size`` elements: the last ``flat`` dimensions of x."""
    layouts = _layout(weight), _layout(bias), _layout(residual)
    signature = (op, x.dtype, x.shape, x.stride(), x.device, size, flat, mode, residual_mode, _shape, *layouts)
    if (head := _heads.get(signature)) is not None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        total = None if residual is None else torch.empty_like(out)
        args = _pack(
            *head,
            *(x.data_ptr(), _pointer(residual), _pointer(weight), _pointer(bias), out.data_ptr()),
            *(_pointer(total), _pointer(mean), _pointer(rstd), eps),
        )
        _run(args, x.device)
        return out, total
    given = [_pointer(v) for v in (x, residual, weight, bias)]
    where = f"aten::{op}"
    code = native.dtype_code(x.dtype, where)
    step = residual_step = size
    if flat != 1 or x.dim() == 0:
        x = x.contiguous()
    elif not x.is_contiguous():
        x, step = _spaced(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight_code = 0
    for name, values in (("weight", weight), ("bias", bias)):
        if values is None:
            continue
        if values.numel() != size:
            raise UsageError(f"{where}: {name} has {values.numel()} elements, a row has {size}")
        if weight is not None and values.dtype != weight.dtype:
            raise UsageError(f"{where}: weight is {weight.dtype} and bias {values.dtype}; give both the same dtype")
        if values.device != x.device:
            raise UsageError(f"{where}: x is on {x.device} and its {name} on {values.device}; put both on one device")
        weight_code = native.dtype_code(values.dtype, f"{where}, its {name}")
    if weight_code not in (0, code):  # the kernel takes the rows' dtype and fp32
        weight, bias = (None if v is None else v.float() for v in (weight, bias))
        weight_code = 0
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    total = None
    if residual is not None:
        residual, residual_step = _spaced(residual)
        total = torch.empty_like(out)
    sizes = (x.numel() // max(size, 1), size, 1, step, residual_step)
    head = (OPS[op], code, code, weight_code, mode, residual_mode, _shape, *sizes)
    pointers = [_pointer(v) for v in (x, residual, weight, bias)]
    if pointers == given:
        _keep(signature, head)
    args = _pack(*head, *pointers, out.data_ptr(), _pointer(total), _pointer(mean), _pointer(rstd), eps)
    _run(args, x.device)
    return out, total


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    mode: WeightMode = "fp32",
    residual: torch.Tensor | None = None,
    residual_mode: ResidualMode = "R",
) -> Any:
    """RMSNorm over the last dimension, or add + RMSNorm where ``residual`` is given: ``rows.rms_norm`` on a GPU."""
    if mode not in WEIGHT_MODES or residual_mode not in RESIDUAL_MODES:
        raise UsageError(f"rms_norm: mode {mode!r} is one of {list(WEIGHT_MODES)}, residual_mode one of R, U")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise UsageError(
            f"rms_norm: residual is {residual.dtype} {list(residual.shape)} on {residual.device}, "
            f"x is {x.dtype} {list(x.shape)} on {x.device}; they have to agree"
        )
    size = x.shape[-1] if x.dim() else 1
    found = _norm(
        *("rms_norm", x, size, weight, None, rows.EPS if eps is None else eps),
        mode=WEIGHT_MODES[mode],
        residual=residual,
        residual_mode=RESIDUAL_MODES[residual_mode],
    )
    return found[0] if residual is None else found


def rms_norm_aten(
    input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> Any:
    """aten::rms_norm: weight mode ``fp32``."""
    result = fused_rms_norm(input, normalized_shape, weight, eps, statistic=False)
    return result if result is NotImplemented else result[0]


def fused_rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    eps: float | None,
    *,
    statistic: bool = True,
) -> Any:
    """aten::_fused_rms_norm: the norm and r, r in fp32."""
    if not (input.is_floating_point() or input.is_complex()):
        return NotImplemented
    size = rows.row_size(input, normalized_shape, "aten::rms_norm")
    rstd = _statistic(input, normalized_shape, torch.float32) if statistic else None
    flat = len(normalized_shape)
    out, _ = _norm("rms_norm", input, size, weight, None, rows.EPS if eps is None else eps, flat=flat, rstd=rstd)
    return out, rstd


def native_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Any:
    """aten::native_layer_norm: (norm, mean, 1 / standard deviation), the last two in fp32 and one element a row.

    torch's CPU kernel gives both in the input's dtype, its CUDA kernel in fp32.
    """
    if not (input.is_floating_point() or input.is_complex()):
        return NotImplemented
    size = rows.row_size(input, normalized_shape, "aten::native_layer_norm")
    mean, rstd = (_statistic(input, normalized_shape, torch.float32) for _ in range(2))
    flat = len(normalized_shape)
    out, _ = _norm("layer_norm", input, size, weight, bias, eps, flat=flat, mean=mean, rstd=rstd)
    return out, mean, rstd


def _statistic(x: torch.Tensor, normalized_shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    ones = [1] * len(normalized_shape)
    return torch.empty([*x.shape[: x.dim() - len(ones)], *ones], dtype=dtype, device=x.device)


COVERED: dict[str, Callable[..., Any]] = {
    **_forms.covered(),
    "aten::rms_norm": rms_norm_aten,
    "aten::_fused_rms_norm": fused_rms_norm,
    "aten::native_layer_norm": native_layer_norm,
}
"""Operations that this family computes on CUDA tensors, each with its function."""

ORDER_FREE = rows.ORDER_FREE
REDUCES = frozenset(COVERED) - ORDER_FREE
"""Those that contain a sum."""


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare the GPU's kernel of ``op`` with the reference; (results compared, their bytes), or Diverged."""
    native.dtype_code(dtype, op)
    return rows_cuda_proof.prove(op, dtype, COVERED[op])
