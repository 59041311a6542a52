"""linear, matmul and their kin on NVIDIA GPUs, in bf16, fp16 and fp32: one order of k, whatever the number of rows.

The order is that of csrc/matmul_gpu.h. In fp32 it is one chain of FMAs, the bits of ``detinfer/reference/matmul.py``. In
bf16 and fp16 it is the matrix unit's own: an accumulator for each leaf of ``leaf_length`` terms, leaves added ascending.

Paths, all of the same bits, so that which one runs is a matter of speed: ``skinny`` (few rows, aligned operands), ``tile``
(any rows, any strides, batches), ``cublaslt_no_split`` (cuBLASLt held to algorithms that keep k in one piece, only at the
numbers of rows where ``matmul_cuda_proof`` has compared it on this machine) and ``reference``, plain and slow. No call
makes a proof, allocates outside torch or waits for the device: all of this runs inside the capture of a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch

from detinfer import native
from detinfer.errors import NativeError, UnsupportedDtype, UsageError
from detinfer.ops import cublaslt
from detinfer.ops.matmul_table import PIECE, Choice, Key, leaf_length, table
from detinfer.ops.matmul_views import Views, dot_views, linear_views, matmul_views, three, two, vector_views

PATHS = {"reference": 0, "skinny": 1, "tile": 2}
"""csrc's paths and their codes."""

SKINNY_ROWS = 512
"""Rows of x that one call of the kernel for few rows takes."""

_SKINNY_RULE = 64  # without a measured table: up to here the kernel for few rows, then the tiles
_COPY_ROWS = 128  # from here on a weight in another layout is worth a copy
_args = struct.Struct("@3i2fi17q4P")  # GpuMatmulArgs of csrc/matmul_gpu.h


@functools.cache
def _function() -> tuple[Callable[[bytes, int], int], Any]:
    handle = native.gpu_library()
    if (found := handle.detinfer_gpu_matmul_size()) != _args.size:
        raise NativeError(
            f"the GPU library's matmul takes {found} bytes, this detinfer gives {_args.size}: reinstall it"
        )
    handle.detinfer_gpu_matmul_error.restype = ctypes.c_char_p
    handle.detinfer_gpu_matmul.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    return handle.detinfer_gpu_matmul, handle.detinfer_gpu_matmul_error


def _stream(device: int) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device))


def run(
    path: str,
    x: torch.Tensor,
    w: torch.Tensor,
    c: torch.Tensor | None,
    out: torch.Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    variant: int = -1,
) -> None:
    """One product on one of csrc's paths: x [(B,) M, K], w [(B,) N, K], c like out or none, out [(B,) M, N], any strides.

    Raises NativeError where the library is missing or refuses.
    """
    function, error = _function()
    *batch, m, k = x.shape
    n = w.shape[-2]
    fill = () if batch else (0,)
    device = x.device.index
    args = _args.pack(
        *(native.DTYPES[x.dtype], PATHS[path], variant, alpha, beta, 0, leaf_length(k, n, x.dtype)),
        *(batch[0] if batch else 1, m, n, k, *fill, *x.stride(), *fill, *w.stride()),
        *((0, 0, 0) if c is None else (*fill, *c.stride())),
        *(*fill, *out.stride(), x.data_ptr(), w.data_ptr(), 0 if c is None else c.data_ptr(), out.data_ptr()),
    )
    if device == torch._C._cuda_getDevice():
        status = function(args, _stream(device))
    else:
        with torch.cuda.device(device):
            status = function(args, _stream(device))
    if status:
        raise NativeError((error() or b"").decode())


def streams(t: torch.Tensor) -> bool:
    """Whether the kernel for few rows and cuBLASLt take a [rows, k] operand of 16-bit elements as it lies."""
    rows, k = t.shape
    return k % 8 == 0 and t.stride(1) == 1 and (rows == 1 or t.stride(0) % 8 == 0) and t.data_ptr() % 16 == 0


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    c: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    path: str | None = None,
    variant: int = -1,
) -> torch.Tensor:
    """alpha * x @ w^T + beta * c as a contiguous tensor: x [(B,) M, K], w [(B,) N, K], c [(B,) M, N] or none.

    ``path`` and ``variant`` hold it to a kernel of csrc's: for tests and timings.
    """
    out = torch.empty((*x.shape[:-1], w.shape[-2]), dtype=x.dtype, device=x.device)
    if path is not None:
        run(path, x, w, c, out, alpha, beta, variant)
    elif x.dtype is torch.float32 or x.dim() == 3:
        chosen = None if x.dim() == 3 else table(_key(x, w, c))
        run("tile", x, w, c, out, alpha, beta, -1 if chosen is None else chosen.choose(x.shape[0]).variant)
    else:
        _rows(x, w, c, out, alpha, beta)
    return out


def _key(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None) -> Key:
    return Key(w.shape[0], w.shape[1], x.dtype, w.stride(0), c is not None, x.device.index)


def _rows(
    x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None, out: torch.Tensor, alpha: float, beta: float
) -> None:
    """bf16 and fp16 without batches: the fastest path that holds for the operands as they lie."""
    m, k = x.shape
    if m == 0 or w.shape[0] == 0:
        return
    if not streams(w):
        if k % 8 or k == 0 or m < _COPY_ROWS:
            run("tile", x, w, c, out, alpha, beta)
            return
        w = w.clone(memory_format=torch.contiguous_format)
    if not streams(x):
        x = x.clone(memory_format=torch.contiguous_format)  # a buffer of torch's is aligned
    measured = table(_key(x, w, c))
    if measured is None:
        run("skinny" if m <= _SKINNY_RULE else "tile", x, w, c, out, alpha, beta)
        return
    for start in range(0, m, PIECE):  # the largest number of rows that is proved
        left = min(m - start, PIECE)
        while left:
            count = measured.piece(left)
            part = slice(start, start + count)
            _chosen(measured.choose(count), x[part], w, None if c is None else c[part], out[part], alpha, beta)
            start, left = start + count, left - count


def _chosen(
    choice: Choice,
    x: torch.Tensor,
    w: torch.Tensor,
    c: torch.Tensor | None,
    out: torch.Tensor,
    alpha: float,
    beta: float,
) -> None:
    if choice.path != "cublaslt_no_split":
        run(choice.path, x, w, c, out, alpha, beta, choice.variant)
    elif alpha != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[1]) or not _is_bias(c, beta):
        run("tile", x, w, c, out, alpha, beta)
    else:
        run_cublaslt(choice.algorithm, x, w, c, out)


def _is_bias(c: torch.Tensor | None, beta: float) -> bool:
    """Whether cuBLASLt's epilogue can add c: one aligned vector for all rows, times 1."""
    return c is None or (beta == 1 and c.stride() == (0, 1) and c.data_ptr() % 16 == 0)


def run_cublaslt(
    algorithm: bytes, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """One product by cuBLASLt, proved or not: x [M, K] contiguous, w [N, K], bias a row of [M, N] with stride 0.

    Where k has leaves, one after the other is added into fp32, and the bias before the last rounding.
    """
    (m, k), n = x.shape, w.shape[0]
    leaf, device = leaf_length(k, n, x.dtype), x.device.index
    stream = _stream(device)
    with torch.cuda.device(device):
        if leaf >= k:
            at = 0 if bias is None else bias.data_ptr()
            problem = cublaslt.Problem(x.dtype, x.dtype, m, n, k, k, w.stride(0), n, at)
            cublaslt.product(problem, device).run(x.data_ptr(), w.data_ptr(), out.data_ptr(), algorithm, stream)
            return
        sums = torch.empty((m, n), dtype=torch.float32, device=x.device)
        problem = cublaslt.Problem(x.dtype, torch.float32, m, n, leaf, k, w.stride(0), n)
        leaves = cublaslt.product(problem, device)
        for first in range(0, k, leaf):
            step = first * x.element_size()
            leaves.run(x.data_ptr() + step, w.data_ptr() + step, sums.data_ptr(), algorithm, stream, added=first > 0)
        out.copy_(sums if bias is None else sums + bias)


def _compute(
    views: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Views],
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Any:
    """The result for the operands as the caller has them; NotImplemented where all are integers."""
    tensors = [t for t in (a, b, c) if t is not None]
    if not any(t.is_floating_point() or t.is_complex() for t in tensors):
        return NotImplemented
    if len({t.dtype for t in tensors}) > 1 or len({t.device for t in tensors}) > 1 or a.device.type != "cuda":
        found = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise UsageError(f"{name}: the operands are {found}; they must have one dtype and lie on one GPU")
    if a.dtype not in native.DTYPES:
        raise UnsupportedDtype(f"{name}: {a.dtype} has no canonical order on a GPU; use float32, bfloat16 or float16")
    try:
        shape, x, w, added = views(a, b, c)
        if x.shape[-1] != w.shape[-2] or x.shape[:-2] != w.shape[:-2]:
            raise RuntimeError(f"cannot multiply {list(x.shape)} and {list(w.shape)}")
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise UsageError(f"{name}: operands of shapes {shapes} do not fit each other: {error}") from None
    w = w.transpose(-1, -2)
    if x.dim() > 3:
        x, w = x.flatten(0, -3), w.flatten(0, -3)
        added = None if added is None else added.flatten(0, -3)
    if x.dim() == 3 and x.shape[0] == 1:
        x, w, added = x[0], w[0], None if added is None else added[0]
    return product(x, w, added, float(alpha), float(beta)).view(shape)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, path: str | None = None) -> Any:
    """aten::linear: x [..., K] or [K], weight [N, K] or [K], bias [N], [1] or none -> [..., N] or [...].

    The bias is added in fp32 before the one rounding. ``path`` holds the product to ``skinny`` (at most 512 rows),
    ``tile`` or ``reference``. Like all functions here, raises UnsupportedDtype for float64 and complex, UsageError for
    operands that do not fit or lie on different devices, NativeError where the GPU library is missing or refuses.
    """
    if path is None:
        return _compute(linear_views, "aten::linear", x, weight, bias)
    if path not in PATHS:
        raise UsageError(f"linear: there is no path {path!r}; choose {', '.join(PATHS)}")
    shape, rows, w, c = linear_views(x, weight, bias)
    return product(rows, w.t(), c, path=path).view(shape)


def matmul(a: torch.Tensor, b: torch.Tensor) -> Any:
    """aten::matmul: torch's rules for vectors; leading dimensions broadcast."""
    return _compute(matmul_views, "aten::matmul", a, b)


def mm(a: torch.Tensor, b: torch.Tensor) -> Any:
    """aten::mm: [M, K] times [K, N]."""
    return _compute(two, "aten::mm", a, b)


def addmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """aten::addmm: beta * c + alpha * a @ b, c broadcast to [M, N]; c is not read when beta is 0."""
    return _compute(two, "aten::addmm", a, b, c if beta != 0 else None, alpha, beta)


def bmm(a: torch.Tensor, b: torch.Tensor) -> Any:
    """aten::bmm: [B, M, K] times [B, K, N]."""
    return _compute(three, "aten::bmm", a, b)


def baddbmm(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """aten::baddbmm: beta * c + alpha * a @ b in batches, c broadcast to [B, M, N]; not read when beta is 0."""
    return _compute(three, "aten::baddbmm", a, b, c if beta != 0 else None, alpha, beta)


def mv(a: torch.Tensor, x: torch.Tensor) -> Any:
    """aten::mv: [M, K] times [K] -> [M]."""
    return _compute(vector_views, "aten::mv", a, x)


def addmv(c: torch.Tensor, a: torch.Tensor, x: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """aten::addmv: beta * c + alpha * a @ x, [M, K] times [K] -> [M]; c is not read when beta is 0."""
    return _compute(vector_views, "aten::addmv", a, x, c if beta != 0 else None, alpha, beta)


def dot(x: torch.Tensor, y: torch.Tensor) -> Any:
    """aten::dot: [K] times [K] -> a scalar."""
    return _compute(dot_views, "aten::dot", x, y)


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
"""``aten::name``: the function that computes it, with the schema's own signature."""

REDUCES: frozenset[str] = frozenset(COVERED)
"""Those of them that contain a reduction: all."""


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare ``op`` with the reference on this GPU, on stress inputs: (results compared, their bytes).

    Raises Diverged with the first difference, UnsupportedDtype for a dtype without an order.
    """
    from detinfer.ops import matmul_cuda_proof

    if dtype not in native.DTYPES:
        raise UnsupportedDtype(f"{op}: {dtype} has no canonical order on a GPU; use float32, bfloat16 or float16")
    return matmul_cuda_proof.prove(op, dtype, COVERED[op])
