"""linear, matmul and their kin on CPU: one chain of FMAs for each output, k ascending, whatever the batch.

The order is that of ``detinfer/reference/matmul.py``. Operands are fp32, bf16 or fp16, all of one dtype, with any
strides; the chain runs in fp32. A weight is never copied or kept: it is packed anew in each call, so that a change in
place is seen. Integer operands give NotImplemented (their sums are exact in any order); float64 and complex raise
UnsupportedDtype.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from detinfer import native
from detinfer.errors import UsageError

__all__ = ["COVERED", "REDUCES", "prove"]

_BATCH_DIMS = 6
AUTO, FMA, DOT = 0, 1, 2
"""csrc's path: by a timing at first use, fp32 FMA, or vdpbf16ps where its bits are those of the chain."""


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "path", "batch_dims")),
        *((name, ctypes.c_float) for name in ("alpha", "beta")),
        *(
            (name, ctypes.c_int64)
            for name in ["m", "n", "k", "a_m", "a_k", "b_k", "b_n", "c_m", "c_n", "out_m", "out_n"]
        ),
        *((name, ctypes.c_int64 * _BATCH_DIMS) for name in ("batch", "a_batch", "b_batch", "c_batch", "out_batch")),
    )


class _Args(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("plan", "a", "b", "c", "out"))


@functools.cache
def _function() -> Callable[[Any], int]:
    function: Any = native.library().detinfer_cpu_matmul
    function.argtypes = (ctypes.c_void_p,)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


Strides = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _plan(
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    batch: tuple[int, ...],
    strides: tuple[Strides, Strides, Strides, Strides],
    alpha: float,
    beta: float,
    path: int,
) -> tuple[int, _Plan]:
    """A plan and its address. ``strides`` are those of a, b, c and out: the batch's first, then rows and columns."""
    (a, b, c, out), depth = strides, len(batch)
    plan = _Plan(native.dtype_code(dtype, "matmul"), path, depth, alpha, beta, *sizes)
    (plan.a_m, plan.a_k), (plan.b_k, plan.b_n) = a[depth:], b[depth:]
    (plan.c_m, plan.c_n), (plan.out_m, plan.out_n) = c[depth:], out[depth:]
    for name, values in (("batch", batch), ("a_batch", a), ("b_batch", b), ("c_batch", c), ("out_batch", out)):
        getattr(plan, name)[:depth] = values[:depth]
    return ctypes.addressof(plan), plan  # the plan is returned so that its memory lives as long as the address


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    path: int = AUTO,
    where: str = "matmul",
) -> torch.Tensor:
    """alpha * a @ b + beta * c for a [*batch, M, K], b [*batch, K, N], c broadcast to [*batch, M, N].

    ``a`` and ``b`` have one dtype and the same batch, broadcast by strides of 0. ``path`` holds the kernel (for
    tests): AUTO, FMA or DOT. Raises UnsupportedDtype, and UsageError for operands of different dtypes or sizes.
    """
    *batch, m, k = a.shape
    n = b.shape[-1]
    _check(a, b, c, where)
    out = torch.empty((*batch, m, n), dtype=a.dtype)
    none = (0,) * (len(batch) + 2)
    if c is not None:
        c = c.expand(out.shape)
    strides = (a.stride(), b.stride(), none if c is None else c.stride(), out.stride())
    address, _ = _plan(a.dtype, (m, n, k), tuple(batch), strides, float(alpha), float(beta), path)
    args = _Args(address, a.data_ptr(), b.data_ptr(), 0 if c is None else c.data_ptr(), out.data_ptr())
    if status := _function()(ctypes.byref(args)):
        native.check(status)
    return out


def _check(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, where: str) -> None:
    native.dtype_code(a.dtype, where)
    if a.dtype != b.dtype or (c is not None and c.dtype != a.dtype):
        dtypes = ", ".join(str(t.dtype) for t in (a, b, c) if t is not None)
        raise UsageError(f"{where}: operands of {dtypes}; they need one dtype")
    if a.shape[-1] != b.shape[-2]:
        raise UsageError(f"{where}: shapes {list(a.shape)} and {list(b.shape)} cannot be multiplied")


def _exact(*tensors: torch.Tensor | None) -> bool:
    """Whether all operands are integers or bools: exact in any order, torch's own kernel may have them."""
    return not any(t is not None and (t.is_floating_point() or t.is_complex()) for t in tensors)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """aten::linear: x [..., K], weight [N, K] or [K], bias [N] or none -> [..., N] or [...]."""
    if _exact(x, weight):
        return NotImplemented  # type: ignore[no-any-return]
    if weight.dim() == 1:
        return matmul(x, weight) if bias is None else _plus(matmul(x, weight), bias)
    shape = x.shape
    if x.dim() != 2:
        x = x.reshape(-1, shape[-1])
    out = product(x, weight.t(), bias, where="aten::linear")
    return out if len(shape) == 2 else out.view(*shape[:-1], weight.shape[0])


def _plus(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    raise UsageError(f"aten::linear: a bias of shape {list(bias.shape)} with a weight of one dimension")


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """aten::mm: [M, K] times [K, N]."""
    if _exact(a, b):
        return NotImplemented  # type: ignore[no-any-return]
    _dimensions("aten::mm", (a, 2), (b, 2))
    return product(a, b, where="aten::mm")


def addmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """aten::addmm: beta * c + alpha * a @ b, c broadcast to [M, N]; c is not read when beta is 0."""
    if _exact(c, a, b):
        return NotImplemented  # type: ignore[no-any-return]
    _dimensions("aten::addmm", (a, 2), (b, 2))
    return product(a, b, c if beta != 0 else None, alpha=alpha, beta=beta, where="aten::addmm")


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """aten::bmm: [B, M, K] times [B, K, N]."""
    if _exact(a, b):
        return NotImplemented  # type: ignore[no-any-return]
    _dimensions("aten::bmm", (a, 3), (b, 3))
    if a.shape[0] != b.shape[0]:
        raise UsageError(f"aten::bmm: batches of {a.shape[0]} and {b.shape[0]}")
    return product(a, b, where="aten::bmm")


def baddbmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """aten::baddbmm: beta * c + alpha * a @ b in batches, c broadcast to [B, M, N]; not read when beta is 0."""
    if _exact(c, a, b):
        return NotImplemented  # type: ignore[no-any-return]
    _dimensions("aten::baddbmm", (a, 3), (b, 3))
    if a.shape[0] != b.shape[0]:
        raise UsageError(f"aten::baddbmm: batches of {a.shape[0]} and {b.shape[0]}")
    return product(a, b, c if beta != 0 else None, alpha=alpha, beta=beta, where="aten::baddbmm")


def mv(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """aten::mv: [M, K] times [K] -> [M]."""
    if _exact(a, x):
        return NotImplemented  # type: ignore[no-any-return]
    _dimensions("aten::mv", (a, 2), (x, 1))
    return product(a, x[:, None], where="aten::mv").squeeze(-1)


def addmv(c: torch.Tensor, a: torch.Tensor, x: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """aten::addmv: beta * c + alpha * a @ x, [M, K] times [K] -> [M]; c is not read when beta is 0."""
    if _exact(c, a, x):
        return NotImplemented  # type: ignore[no-any-return]
    _dimensions("aten::addmv", (a, 2), (x, 1))
    column = c.expand(a.shape[0])[:, None] if beta != 0 else None
    return product(a, x[:, None], column, alpha=alpha, beta=beta, where="aten::addmv").squeeze(-1)


def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """aten::dot: [K] times [K] -> a scalar."""
    if _exact(x, y):
        return NotImplemented  # type: ignore[no-any-return]
    _dimensions("aten::dot", (x, 1), (y, 1))
    return product(x[None], y[:, None], where="aten::dot").reshape(())


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """aten::matmul: torch's rules for vectors, and leading dimensions broadcast."""
    if _exact(a, b):
        return NotImplemented  # type: ignore[no-any-return]
    if a.dim() == 0 or b.dim() == 0:
        raise UsageError("aten::matmul: both operands need at least one dimension")
    left = a[None] if a.dim() == 1 else a
    right = b[:, None] if b.dim() == 1 else b
    if right.dim() == 2 and left.dim() > 2:
        # One weight for all: the leading dimensions are rows.
        shape = (*left.shape[:-1], right.shape[-1])
        out = product(left.reshape(-1, left.shape[-1]), right, where="aten::matmul").view(shape)
    else:
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])  # type: ignore[no-untyped-call]
        if len(batch) > _BATCH_DIMS:
            raise UsageError(f"aten::matmul: {len(batch)} leading dimensions; at most {_BATCH_DIMS} are supported")
        left, right = left.expand(*batch, *left.shape[-2:]), right.expand(*batch, *right.shape[-2:])
        out = product(left, right, where="aten::matmul")
    if b.dim() == 1:
        out = out.squeeze(-1)
    if a.dim() == 1:
        out = out.squeeze(-1 if b.dim() == 1 else -2)
    return out


def _dimensions(where: str, *wanted: tuple[torch.Tensor, int]) -> None:
    for tensor, count in wanted:
        if tensor.dim() != count:
            raise UsageError(f"{where}: shape {list(tensor.shape)} where {count} dimensions are needed")


COVERED: dict[str, Callable[..., Any]] = {
    "aten::linear": linear,
    "aten::matmul": matmul,
    "aten::mm": mm,
    "aten::addmm": addmm,
    "aten::bmm": bmm,
    "aten::baddbmm": baddbmm,
    "aten::mv": mv,
    "aten::addmv": addmv,
    "aten::dot": dot,
}

REDUCES = frozenset(COVERED)


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare ``op`` with the reference on this machine: (results compared, their bytes); Diverged on a mismatch."""
    from detinfer.ops.matmul_proof import prove as run

    return run(op, dtype)
