"""linear, matmul and their kin on CPU: one chain of FMAs for each output, k ascending, whatever the batch.

The order is that of ``detinfer/reference/matmul.py``. Operands are fp32, bf16 or fp16, all of one dtype, with any
strides; the chain runs in fp32. A weight is never copied or kept: it is packed anew in each call, so that a change in
place is seen. Operands that are all integers give NotImplemented (their sums are exact in any order).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import torch

from detinfer import native
from detinfer.errors import UsageError
from detinfer.ops import matmul_proof
from detinfer.ops.matmul_forms import Forms
from detinfer.ops.matmul_views import BATCH_DIMS, Views, two

AUTO, FMA, DOT = 0, 1, 2
"""csrc's paths: by a timing at first use, fp32 FMA, or vdpbf16ps where its bits are those of the chain."""

DOT_VARIABLE = "DETINFER_CPU_DPBF16"
"""``0`` or ``1`` holds the path of bf16 on CPUs with AVX512-BF16 to FMA or vdpbf16ps instead of timing both."""

_KEPT_CALLS = 4096


class _Plan(ctypes.Structure):
    """MatmulPlan of csrc/matmul.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "path", "batch_dims")),
        *((name, ctypes.c_float) for name in ("alpha", "beta")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k")),
        *((name, ctypes.c_int64) for name in ("a_m", "a_k", "b_k", "b_n", "c_m", "c_n", "out_m", "out_n")),
        *((name, ctypes.c_int64 * BATCH_DIMS) for name in ("batch", "a_batch", "b_batch", "c_batch", "out_batch")),
    )


_args = struct.Struct("@5P")  # MatmulArgs of csrc/matmul.h
_pack_args = _args.pack


class _Call:
    """Everything about a call but its pointers: made once for a set of shapes, strides, dtypes and scalars."""

    __slots__ = ("address", "dtype", "plan", "run", "shape", "stride")

    def __init__(self, views: Views, alpha: float, beta: float, path: int, name: str) -> None:
        _, a, b, c = views
        *batch, m, k = a.shape
        n, depth = b.shape[-1], len(batch)
        plan = _Plan(native.dtype_code(a.dtype, name), path, depth, alpha, beta, m, n, k)
        (plan.a_m, plan.a_k), (plan.b_k, plan.b_n) = a.stride()[depth:], b.stride()[depth:]
        plan.out_m, plan.out_n = n, 1
        out_batch, step = [0] * depth, m * n
        for i in reversed(range(depth)):
            out_batch[i] = step
            step *= batch[i]
        plan.batch[:depth], plan.out_batch[:depth] = batch, out_batch
        plan.a_batch[:depth], plan.b_batch[:depth] = a.stride()[:depth], b.stride()[:depth]
        if c is not None:
            plan.c_batch[:depth] = c.stride()[:depth]
            plan.c_m, plan.c_n = c.stride()[depth:]
        self.run = native.entry("matmul", _args.size + ctypes.sizeof(_Plan))
        self.plan = plan
        self.address = ctypes.addressof(plan)
        self.shape = views.shape
        self.stride = torch.empty(views.shape, device="meta").stride()
        self.dtype = a.dtype


_calls: dict[tuple[Any, ...], _Call] = {}


def _compute(
    views: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Views],
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    path: int = AUTO,
) -> Any:
    """The result for the operands as the caller has them; ``views`` makes of them what is multiplied."""
    signature = (
        name, a.dtype, b.dtype, a.shape, b.shape, a.stride(), b.stride(), alpha, beta, path,
        None if c is None else (c.dtype, c.shape, c.stride()),
    )  # fmt: skip
    call = _calls.get(signature)
    if call is None:
        found = _prepare(signature, views, name, a, b, c, alpha, beta, path)
        if found is NotImplemented:
            return NotImplemented
        call, (_, a, b, c) = found
    out = torch.empty_strided(call.shape, call.stride, dtype=call.dtype)
    added = 0 if c is None else c.data_ptr()
    if status := call.run(_pack_args(call.address, a.data_ptr(), b.data_ptr(), added, out.data_ptr())):
        native.check(status)
    return out


def _prepare(
    signature: tuple[Any, ...],
    views: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Views],
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None,
    alpha: float,
    beta: float,
    path: int,
) -> Any:
    """The call and the operands as it multiplies them; the call is kept where these are the caller's own memory."""
    if not any(t.is_floating_point() or t.is_complex() for t in (a, b, c) if t is not None):
        return NotImplemented
    if len({t.dtype for t in (a, b, c) if t is not None}) != 1:
        dtypes = ", ".join(str(t.dtype) for t in (a, b, c) if t is not None)
        raise UsageError(f"{name}: the operands are {dtypes}; convert them to one dtype")
    native.dtype_code(a.dtype, name)
    try:
        seen = views(a, b, c)
        if seen.a.shape[-1] != seen.b.shape[-2] or seen.a.shape[:-2] != seen.b.shape[:-2]:
            raise RuntimeError(f"cannot multiply {list(seen.a.shape)} and {list(seen.b.shape)}")
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(list(t.shape)) for t in (a, b, c) if t is not None)
        raise UsageError(f"{name}: operands of shapes {shapes} do not fit each other: {error}") from None
    call = _Call(seen, float(alpha), float(beta), path, name)
    pairs = ((a, seen.a), (b, seen.b), *(((c, seen.c),) if c is not None and seen.c is not None else ()))
    if all(given.data_ptr() == view.data_ptr() for given, view in pairs):  # a copy must be made in every call
        if len(_calls) >= _KEPT_CALLS:
            _calls.clear()
        _calls[signature] = call
    return call, seen


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    path: int = AUTO,
) -> torch.Tensor:
    """alpha * a @ b + beta * c for a [M, K], b [K, N], c broadcast to [M, N], by a chosen path: for tests and timings.

    Raises UnsupportedDtype for other dtypes than fp32, bf16 and fp16, UsageError for operands that do not fit.
    """
    out: torch.Tensor = _compute(two, "product", a, b, c, alpha, beta, path)
    return out


_forms = Forms(_compute)
linear = _forms.linear
matmul = _forms.matmul
mm = _forms.mm
addmm = _forms.addmm
bmm = _forms.bmm
baddbmm = _forms.baddbmm
mv = _forms.mv
addmv = _forms.addmv
dot = _forms.dot

COVERED: dict[str, Callable[..., Any]] = _forms.covered()
"""``aten::name``: the function that computes it, with the schema's own signature."""

REDUCES: frozenset[str] = frozenset(COVERED)
"""Those of them that contain a reduction: all."""


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare ``op`` with ``detinfer.reference.matmul`` on stress inputs: (results compared, their bytes).

    Raises Diverged with the first difference, UnsupportedDtype for a dtype without an order.
    """
    native.dtype_code(dtype, op)
    return matmul_proof.prove(op, dtype, COVERED[op])
