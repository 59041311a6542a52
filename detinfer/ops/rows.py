"""Reductions along rows on CPU: sum, mean, softmax, log_softmax, RMSNorm and LayerNorm in the contract's row_sum order.

A row's bits depend on that row alone. Inputs are fp32, bf16 or fp16; arithmetic is fp32; a result is rounded once to
its dtype. Reduced dimensions are moved last in ascending order and flattened in row-major order: that is the row.
Integer sums are exact in any order and left to torch; float64 and complex raise UnsupportedDtype.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from detinfer import native
from detinfer.errors import UsageError
from detinfer.ops import rows_proof
from detinfer.ops.rows_forms import Forms

# In the order of csrc/rows.h, whose numbers these are.
OPS = {
    name: number
    for number, name in enumerate(("sum", "mean", "max", "min", "softmax", "log_softmax", "rms_norm", "layer_norm"))
}
WEIGHT_MODES = {"llama": 0, "fp32": 1, "gemma": 2}
RESIDUAL_MODES = {"R": 0, "U": 1}

WeightMode = Literal["llama", "fp32", "gemma"]
ResidualMode = Literal["R", "U"]


class _Args(ctypes.Structure):
    # RowsArgs of csrc/rows.h.
    _fields_ = (
        ("op", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("weight_dtype", ctypes.c_int32),
        ("stat_dtype", ctypes.c_int32),
        ("weight_mode", ctypes.c_int32),
        ("residual_mode", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("residual_out", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("rstd", ctypes.c_void_p),
        ("eps", ctypes.c_double),
    )


_ARGS_SIZE = ctypes.sizeof(_Args)


def _run(args: _Args) -> None:
    if status := native.entry("rows", _ARGS_SIZE)(bytes(args)):
        native.check(status)


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _floats(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def ready(x: torch.Tensor, dtype: torch.dtype | None, where: str) -> tuple[torch.Tensor, torch.dtype]:
    """(x for a kernel, dtype of the result) of a reduction of ``x`` for which ``dtype`` was asked."""
    # torch converts to the dtype asked for before it reduces; widening to fp32 is exact, and the kernel's own first step.
    out = dtype or x.dtype
    native.dtype_code(out, where)
    if x.dtype != out and not (out is torch.float32 and x.dtype in native.DTYPES):
        if x.is_floating_point() or x.is_complex():
            native.dtype_code(x.dtype, where)
        x = x.to(out)
    return x, out


def dimensions(dim: int | Sequence[int] | None, ndim: int) -> list[int]:
    """The dimensions named by ``dim``, ascending; all of them for None and the empty list. Errors are torch's own."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(ndim))
    found = []
    for d in [dim] if isinstance(dim, int) else dim:
        if not -max(ndim, 1) <= d < max(ndim, 1):
            raise IndexError(
                f"Dimension out of range (expected to be in [{-max(ndim, 1)}, {max(ndim, 1) - 1}], got {d})"
            )
        found.append(d % max(ndim, 1))
    if len(set(found)) != len(found):
        raise RuntimeError(f"a dim appears multiple times in the list of dims {found}")
    return sorted(found)


_pack_args = struct.Struct("@7i3q8Pd").pack  # RowsArgs of csrc/rows.h
_KEPT_REDUCTIONS = 4096


class _Reduction(NamedTuple):
    """Everything about a reduction but its pointers, for inputs that are read where they lie."""

    head: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        args = _pack_args(*self.head, x.data_ptr(), 0, 0, 0, out.data_ptr(), 0, 0, 0, 0.0)
        if status := native.entry("rows", _ARGS_SIZE)(args):
            native.check(status)
        return out


_reductions: dict[tuple[Any, ...], _Reduction] = {}


def _reduce(
    op: str, self: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None
) -> Any:
    dims = tuple(dim) if isinstance(dim, list) else dim
    signature = (op, self.dtype, self.shape, self.stride(), dims, keepdim, dtype)
    kept = _reductions.get(signature)
    if kept is not None:
        return kept(self)
    reduction = _reduction(op, self, dim, keepdim, dtype)
    if reduction is NotImplemented:
        return NotImplemented
    made, x = reduction
    if x.data_ptr() == self.data_ptr():  # a copy must be made in every call
        if len(_reductions) >= _KEPT_REDUCTIONS:
            _reductions.clear()
        _reductions[signature] = made
    return made(x)


def _reduction(
    op: str, self: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None
) -> Any:
    wanted = dtype or self.dtype
    if not (wanted.is_floating_point or wanted.is_complex):
        return NotImplemented
    where = f"aten::{op}"
    x, out_dtype = ready(self, dtype, where)
    ndim = x.dim()
    reduced = dimensions(dim, ndim)
    if ndim == 0:
        kept: list[int] = []
        reduced = []
    else:
        kept = [d for d in range(ndim) if d not in reduced]
    sizes = x.shape
    shape = [1 if d in reduced else sizes[d] for d in range(ndim)] if keepdim else [sizes[d] for d in kept]
    n = math.prod(sizes[d] for d in reduced)
    if n == 0 and op in ("max", "min"):
        raise IndexError(f"{where}: no elements to choose from in dimensions {reduced} of {list(sizes)}")
    inner = 1
    if kept and reduced and reduced[0] < kept[-1]:
        if reduced[-1] - reduced[0] == len(reduced) - 1:  # neighbours: the kernel steps over what follows them
            inner = math.prod(sizes[reduced[-1] + 1 :])
        else:
            x = x.permute(kept + reduced)
    x = x.contiguous()
    head = (OPS[op], native.DTYPES[x.dtype], native.DTYPES[out_dtype], 0, 0, 0, 0, math.prod(shape), n, inner)
    return _Reduction(head, tuple(shape), out_dtype), x


def _softmax_of(op: str, self: torch.Tensor, dim: int, dtype: torch.dtype | None) -> Any:
    if not _floats(self) and dtype is None:
        return NotImplemented
    x, out_dtype = ready(self, dtype, f"aten::{op}")
    (d,) = dimensions(dim, x.dim())
    last = d >= x.dim() - 1
    x = (x if last else x.movedim(d, -1)).contiguous()
    out = torch.empty(x.shape, dtype=out_dtype)
    n = x.shape[-1] if x.dim() else 1
    args = _Args(OPS[op], native.DTYPES[x.dtype], native.DTYPES[out_dtype])
    args.rows, args.n = x.numel() // max(n, 1), n
    args.x, args.out = x.data_ptr(), out.data_ptr()
    _run(args)
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
) -> tuple[_Args, torch.Tensor, list[torch.Tensor]]:
    # The arguments of a norm, its output, and the tensors that have to live until the call.
    where = f"aten::{op}"
    code = native.dtype_code(x.dtype, where)
    kept = [x.contiguous()]
    out = torch.empty_like(kept[0])
    args = _Args(OPS[op], code, code)
    args.rows, args.n = x.numel() // max(size, 1), size
    args.x, args.out, args.eps = kept[0].data_ptr(), out.data_ptr(), eps
    for name, values in (("weight", weight), ("bias", bias)):
        if values is None:
            continue
        if values.numel() != size:
            raise UsageError(f"{where}: {name} has {values.numel()} elements, a row has {size}")
        if weight is not None and values.dtype != weight.dtype:
            raise UsageError(f"{where}: weight is {weight.dtype} and bias {values.dtype}; give both the same dtype")
        kept.append(values.contiguous())
        args.weight_dtype = native.dtype_code(values.dtype, f"{where}, its {name}")
        setattr(args, name, kept[-1].data_ptr())
    return args, out, kept


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    mode: WeightMode = "fp32",
    residual: torch.Tensor | None = None,
    residual_mode: ResidualMode = "R",
) -> Any:
    """RMSNorm over the last dimension, or add + RMSNorm where ``residual`` (shape and dtype of x) is given.

    h is x, or x + residual: rounded to the dtype in residual mode ``R``, unrounded in ``U``. The result is h r weight
    with r = 1 / sqrt(mean(h^2) + eps). Weight mode ``llama`` rounds h r to the dtype before it multiplies, ``fp32``
    does not, ``gemma`` multiplies by 1 + weight. ``eps`` defaults to fp32's machine epsilon, as in torch.

    Returns the norm, with ``residual`` a pair: the norm and the rounded sum. Raises UsageError for shapes that do not
    fit and unknown modes.
    """
    if mode not in WEIGHT_MODES or residual_mode not in RESIDUAL_MODES:
        raise UsageError(f"rms_norm: mode {mode!r} is one of {list(WEIGHT_MODES)}, residual_mode one of R, U")
    size = x.shape[-1] if x.dim() else 1
    args, out, kept = _norm("rms_norm", x, size, weight, None, EPS if eps is None else eps)
    args.weight_mode = WEIGHT_MODES[mode]
    if residual is None:
        _run(args)
        return out
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise UsageError(
            f"rms_norm: residual is {residual.dtype} {list(residual.shape)}, x is {x.dtype} {list(x.shape)}; "
            "they have to agree"
        )
    kept.append(residual.contiguous())
    total = torch.empty_like(out)
    args.residual, args.residual_out = kept[-1].data_ptr(), total.data_ptr()
    args.residual_mode = RESIDUAL_MODES[residual_mode]
    _run(args)
    return out, total


EPS = torch.finfo(torch.float32).eps
"""RMSNorm's eps where none is given, as in torch."""


def row_size(x: torch.Tensor, normalized_shape: Sequence[int], where: str) -> int:
    """Elements of a row of a norm over the last dimensions ``normalized_shape``."""
    count = len(normalized_shape)
    if count == 0 or list(x.shape[x.dim() - count :]) != list(normalized_shape) or count > x.dim():
        raise RuntimeError(
            f"{where}: normalized_shape {list(normalized_shape)} does not end the input's shape {list(x.shape)}"
        )
    return math.prod(normalized_shape)


def _statistic(x: torch.Tensor, normalized_shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    ones = [1] * len(normalized_shape)
    return torch.empty([*x.shape[: x.dim() - len(ones)], *ones], dtype=dtype)


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
    if not _floats(input):
        return NotImplemented
    size = row_size(input, normalized_shape, "aten::rms_norm")
    args, out, _kept = _norm("rms_norm", input, size, weight, None, EPS if eps is None else eps)
    args.weight_mode = WEIGHT_MODES["fp32"]
    rstd = _statistic(input, normalized_shape, torch.float32) if statistic else None
    args.rstd = _pointer(rstd)
    _run(args)
    return out, rstd


def native_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Any:
    """aten::native_layer_norm: (norm, mean, 1 / standard deviation), the last two one element a row.

    They have the input's dtype, or fp32 where weight or bias are fp32.
    """
    if not _floats(input):
        return NotImplemented
    size = row_size(input, normalized_shape, "aten::native_layer_norm")
    args, out, _kept = _norm("layer_norm", input, size, weight, bias, eps)
    of = next((v.dtype for v in (weight, bias) if v is not None), input.dtype)
    mean, rstd = (_statistic(input, normalized_shape, of) for _ in range(2))
    args.stat_dtype, args.mean, args.rstd = native.DTYPES[of], mean.data_ptr(), rstd.data_ptr()
    _run(args)
    return out, mean, rstd


COVERED: dict[str, Callable[..., Any]] = {
    **_forms.covered(),
    "aten::rms_norm": rms_norm_aten,
    "aten::_fused_rms_norm": fused_rms_norm,
    "aten::native_layer_norm": native_layer_norm,
}
"""Operations that this family computes, each with its function."""

ORDER_FREE = frozenset({"aten::amax", "aten::amin", "aten::max", "aten::min"})
"""Reductions whose result is the same in any order."""

REDUCES = frozenset(COVERED) - ORDER_FREE
"""Those that contain a sum."""


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare the native path of ``op`` with the reference; (results compared, their bytes), or Diverged."""
    native.dtype_code(dtype, op)
    return rows_proof.prove(op, dtype, COVERED[op])
