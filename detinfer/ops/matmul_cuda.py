"""linear, matmul and their kin on NVIDIA GPUs, in bf16, fp16 and fp32: one order of k, whatever the number of rows.

The order is that of csrc/matmul_gpu.h: one accumulator for each output, k ascending. In fp32 that is one chain of FMAs, the
bits of ``detinfer/reference/matmul.py``; in bf16 and fp16 it is the matrix unit's own, in its steps of 16.

Paths, all of the same bits, so that which one runs is a matter of speed: ``skinny`` (few rows, aligned operands), ``tile``
(any rows, any strides, batches), ``wide`` (many rows, aligned operands: ``matmul_wide``), ``stream`` (fp32, aligned
operands), ``cublaslt_no_split`` (cuBLASLt held to algorithms that keep k in one piece, only at the numbers of rows where
``matmul_cuda_proof`` has compared it on this machine) and ``reference``, plain and slow. All of this runs inside the capture
of a CUDA graph: there no call makes a proof or waits for the device, and outside one only the first of ``wide``'s do.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Callable
from typing import Any

import torch

from detinfer import native
from detinfer.errors import NativeError, UnsupportedDtype, UsageError
from detinfer.ops import cublaslt, matmul_blocks, matmul_store, matmul_table, matmul_wide
from detinfer.ops.matmul_blocks import SKINNY_ROWS
from detinfer.ops.matmul_forms import Forms
from detinfer.ops.matmul_table import PIECE, Choice, Key
from detinfer.ops.matmul_views import Views, linear_views

PATHS = {"reference": 0, "skinny": 1, "tile": 2, "stream": 3}
"""csrc's paths and their codes."""

_FEW_ROWS = 64  # up to here the kernels of csrc are as fast as any
_COPY_ROWS = 128  # from here on a weight in another layout is worth a copy
_KEPT_CALLS = 8192
_head, _pointers = struct.Struct("@3i2fi16q"), struct.Struct("@4P")  # GpuMatmulArgs of csrc/matmul_gpu.h
_pack_pointers = _pointers.pack

Step = Callable[[int, int, int, int, int], None]
"""Starts one kernel: the addresses of x, w, c (0 for none) and out, and the stream. Raises NativeError on refusal."""


@functools.cache
def _function() -> tuple[Callable[[bytes, int], int], Any]:
    handle = native.gpu_library()
    if (found := handle.detinfer_gpu_matmul_size()) != (needed := _head.size + _pointers.size):
        raise NativeError(f"the GPU library's matmul takes {found} bytes, this detinfer gives {needed}: reinstall it")
    handle.detinfer_gpu_matmul_error.restype = ctypes.c_char_p
    handle.detinfer_gpu_matmul.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    return handle.detinfer_gpu_matmul, handle.detinfer_gpu_matmul_error


def kernel(
    path: str,
    x: torch.Tensor,
    w: torch.Tensor,
    c: torch.Tensor | None,
    alpha: float = 1.0,
    beta: float = 1.0,
    variant: int = -1,
) -> Step:
    """A product on one of csrc's paths, or on ``wide`` where it takes the operands: x [(B,) M, K], w [(B,) N, K],
    c [(B,) M, N] or none, all of any strides, and out contiguous. Of the tensors only shapes, strides, dtype and device are taken."""
    if path == "wide":
        if (found := wide_kernel(x, w, c, alpha, beta)) is None:
            raise NativeError(
                "matmul: wide needs compute capability 9, Triton, sizes and strides in multiples of 16, and c a vector or none"
            )
        return found
    function, error = _function()
    *batch, m, k = x.shape
    n = w.shape[-2]
    if path == "stream" and variant < 0:
        variant = matmul_blocks.fastest(m, n, processors(x.device.index))
    fill = () if batch else (0,)
    head = _head.pack(
        *(native.DTYPES[x.dtype], PATHS[path], variant, alpha, beta, 0, batch[0] if batch else 1, m, n, k),
        *(*fill, *x.stride(), *fill, *w.stride()),
        *((0, 0, 0) if c is None else (*fill, *c.stride())),
        *(m * n, n, 1),
    )

    def step(x_at: int, w_at: int, c_at: int, out_at: int, stream: int) -> None:
        if function(head + _pack_pointers(x_at, w_at, c_at, out_at), stream):
            raise NativeError((error() or b"").decode())

    return step


def wide_kernel(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None, alpha: float, beta: float) -> Step | None:
    """A product of ``matmul_wide``: x [M, K], w [N, K], c a row of [M, N] or none; None for what it does not take, and inside a
    capture before its code was proved."""
    if x.dim() != 2 or x.dtype not in matmul_wide.DTYPES or not _is_bias(c, alpha, beta):
        return None
    (m, k), n = x.shape, w.shape[0]
    tile = matmul_blocks.wide_tile(m, n, processors(x.device.index))
    code = matmul_wide.find(x, w, c, x.dtype, tile, grouped=False)
    if code is None:
        return None
    numbers = (m, 1, n, k, x.stride(0), 0, *w.stride())

    def step(x_at: int, w_at: int, c_at: int, out_at: int, stream: int) -> None:
        code.start((x_at, w_at, c_at or x_at, x_at, x_at, out_at), numbers, stream)

    return step


def chosen_kernel(
    choice: Choice, x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None, alpha: float = 1.0, beta: float = 1.0
) -> Step:
    """A choice's kernel; another in place of a ``wide`` that cannot run now. cuBLASLt is not among them."""
    if choice.path == "wide":
        return wide_kernel(x, w, c, alpha, beta) or kernel(_not_wide(len(x)), x, w, c, alpha, beta)
    return kernel(choice.path, x, w, c, alpha, beta, choice.variant)


def cublaslt_kernel(algorithm: bytes, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> Step:
    """A product by cuBLASLt, proved or not: x [M, K] contiguous, w [N, K], bias a row of [M, N] with a stride of 0, which
    is read where it lies now."""
    (m, k), n = x.shape, w.shape[0]
    problem = cublaslt.Problem(x.dtype, m, n, k, k, w.stride(0), 0 if bias is None else bias.data_ptr())
    run = cublaslt.Product(problem, x.device.index).run

    def step(x_at: int, w_at: int, c_at: int, out_at: int, stream: int) -> None:
        run(x_at, w_at, out_at, algorithm, stream)

    return step


def streams(t: torch.Tensor) -> bool:
    """Whether the fast kernels and cuBLASLt take a [rows, k] operand as it lies: k contiguous, rows on 16 bytes and apart."""
    (rows, k), unit, step = t.shape, 16 // t.element_size(), t.stride(0)
    return (
        k % unit == 0
        and t.stride(1) == 1
        and (rows == 1 or (step % unit == 0 and step >= k))
        and t.data_ptr() % 16 == 0
    )


@functools.cache
def processors(device: int) -> int:
    """How many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _accelerates(device: int) -> bool:
    """Whether a GPU has the tensor memory accelerator, by which ``skinny`` and ``stream`` read, and the shared memory that
    their blocks take: compute capability 9 and 10 have both, 12 has 99 KiB."""
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)  # 0: not NVIDIA's
    return torch.cuda.get_device_capability(device) >= (9, 0) and int(shared) >= 227 << 10


def by_rule(m: int, n: int, dtype: torch.dtype, device: int) -> Choice:
    """The path where nothing was measured, for operands that ``streams``: right by construction, or proved by its code."""
    if not _accelerates(device):
        return Choice("tile")
    if dtype is torch.float32:
        return Choice("stream")
    if matmul_wide.available(device) and matmul_blocks.suits_wide(m, n, processors(device)):
        return Choice("wide")
    return Choice(_not_wide(m))


def _not_wide(m: int) -> str:
    """The path of csrc for m rows of operands that ``streams``."""
    return "skinny" if m <= SKINNY_ROWS else "tile"


def plan(
    x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None, alpha: float, beta: float, vector: bool
) -> list[tuple[int, int, Step]]:
    """(first row, byte of x, kernel) for each piece of a product without batches, whose operands lie where they will.

    ``vector``: c is none, or a vector whose address is part of the call.
    """
    (m, k), n, size = x.shape, w.shape[0], x.element_size()
    key = Key(n, k, x.dtype, w.stride(0), c is not None, x.device.index)
    if m == 0 or n == 0 or k == 0 or not (streams(x) and streams(w)):
        return [(0, 0, kernel("tile", x, w, c, alpha, beta))]
    measured = matmul_table.table(key)
    packed = m == 1 or x.stride(0) == k
    single, simple = x.dtype is torch.float32, vector and _is_bias(c, alpha, beta)
    if not single and not (packed and simple and cublaslt.ready(key.device)):
        measured = None  # it holds for cuBLASLt's one form alone
    if measured is None and not single and m > _FEW_ROWS and cublaslt.available():
        _tell()
    if measured is None or single:
        chosen = by_rule(m, n, x.dtype, key.device) if measured is None else measured.choose(m)
        if chosen.path == "wide" and not simple:
            chosen = Choice(_not_wide(m))
        return [(0, 0, chosen_kernel(chosen, x, w, c, alpha, beta))]
    found: list[tuple[int, int, Step]] = []
    start = 0
    while start < m:
        count = measured.piece(min(m - start, PIECE))
        part, added = x[start : start + count], None if c is None else c[start : start + count]
        chosen = measured.choose(count)
        step = (
            cublaslt_kernel(chosen.algorithm, part, w, added)
            if chosen.path == "cublaslt_no_split"
            else chosen_kernel(chosen, part, w, added, alpha, beta)
        )
        found.append((start, start * k * size, step))
        start += count
    return found


@functools.cache
def _tell() -> None:
    """Say once in a process that speed is left lying: the bytes are right either way."""
    logging.getLogger("detinfer").warning(
        "linear layers run on kernels that need no proof of their shapes, slower than cuBLASLt above %d rows: run `detinfer "
        "prove TARGET` once on this machine (the bytes stay the same)",
        _FEW_ROWS,
    )


def _is_bias(c: torch.Tensor | None, alpha: float, beta: float) -> bool:
    """Whether cuBLASLt's epilogue can add c: one aligned vector for all rows, times 1."""
    if c is None:
        return alpha == 1
    one_row = c.stride(1) == 1 and (c.stride(0) == 0 or c.shape[0] == 1)
    return alpha == 1 and beta == 1 and one_row and c.data_ptr() % 16 == 0


class _Call:
    """Everything about a call but its pointers: made once for a set of shapes, strides, alignments and scalars."""

    __slots__ = ("c_row", "device", "dtype", "out_row", "shape", "steps")

    def __init__(
        self,
        shape: tuple[int, ...],
        x: torch.Tensor,
        w: torch.Tensor,
        c: torch.Tensor | None,
        alpha: float,
        beta: float,
        vector: bool,
    ) -> None:
        self.shape, self.dtype, self.device = shape, x.dtype, x.device
        self.c_row = 0 if c is None else c.stride(-2) * c.element_size()
        self.out_row = w.shape[-2] * x.element_size()
        batched = x.dim() == 3
        self.steps = [(0, 0, kernel("tile", x, w, c, alpha, beta))] if batched else plan(x, w, c, alpha, beta, vector)

    def __call__(self, x: int, w: int, c: int) -> torch.Tensor:
        """The product of what lies at these addresses."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        to, device = out.data_ptr(), self.device.index
        stream = torch._C._cuda_getCurrentRawStream(device)
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self._start(x, w, c, to, stream)
        elif len(self.steps) == 1:
            self.steps[0][2](x, w, c, to, stream)
        else:
            self._start(x, w, c, to, stream)
        return out

    def _start(self, x: int, w: int, c: int, out: int, stream: int) -> None:
        for row, offset, step in self.steps:
            step(x + offset, w, c + row * self.c_row if c else 0, out + row * self.out_row, stream)


def _placed(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The operands of a product, copied where a fast path then takes them."""
    if x.dim() == 3 or x.shape[1] * x.element_size() % 16 or not x.numel():
        return x, w
    if not streams(w):
        if x.shape[0] < _COPY_ROWS:
            return x, w
        w = w.clone(memory_format=torch.contiguous_format)
    return (x if streams(x) else x.clone(memory_format=torch.contiguous_format)), w  # torch's buffers are aligned


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    c: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    path: str,
    variant: int = -1,
) -> torch.Tensor:
    """alpha * x @ w^T + beta * c on one of csrc's paths, for tests and proofs: x [(B,) M, K], w [(B,) N, K], c [(B,) M, N]."""
    out = torch.empty((*x.shape[:-1], w.shape[-2]), dtype=x.dtype, device=x.device)
    step = kernel(path, x, w, c, alpha, beta, variant)
    with torch.cuda.device(x.device):
        stream = torch._C._cuda_getCurrentRawStream(x.device.index)
        step(x.data_ptr(), w.data_ptr(), 0 if c is None else c.data_ptr(), out.data_ptr(), stream)
    return out


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
    x, w = a.data_ptr(), b.data_ptr()
    added = 0 if c is None else c.data_ptr()
    # A bias's address is part of cuBLASLt's description of a product, so it is part of the signature.
    signature = (
        name, a.dtype, b.dtype, a.shape, b.shape, a.stride(), b.stride(), a.device, b.device, x & 15, w & 15, alpha, beta,
        None if c is None else (c.dtype, c.device, c.shape, c.stride(), added if c.dim() == 1 else None),
    )  # fmt: skip
    call = matmul_table.calls.get(signature)
    if call is not None:
        return call(x, w, added)
    return _first(signature, views, name, a, b, c, float(alpha), float(beta))


def _first(
    signature: tuple[Any, ...],
    views: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Views],
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None,
    alpha: float,
    beta: float,
) -> Any:
    """The result of a call that was not seen yet; the call is kept where its operands are the caller's own memory."""
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
    x, w = _placed(x, w)
    matmul_store.state(a.device.index)  # reads the file of proofs before the first call
    call = _Call(shape, x, w, added, alpha, beta, c is None or c.dim() == 1)
    pairs = ((a, x), (b, w), *(((c, added),) if c is not None and added is not None else ()))
    kept = not torch.cuda.is_current_stream_capturing()  # where the next call may find a faster path
    if kept and all(given.data_ptr() == used.data_ptr() for given, used in pairs):  # a copy must be made in every call
        if len(matmul_table.calls) >= _KEPT_CALLS:
            matmul_table.calls.clear()
        matmul_table.calls[signature] = call
    return call(x.data_ptr(), w.data_ptr(), 0 if added is None else added.data_ptr())


_forms = Forms(_compute)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, path: str | None = None) -> Any:
    """aten::linear: x [..., K] or [K], weight [N, K] or [K], bias [N], [1] or none -> [..., N] or [...].

    The bias is added in fp32 before the one rounding. ``path`` holds the product to ``skinny`` (at most 512 rows),
    ``tile``, ``wide``, ``stream`` or ``reference``. Like all functions here, raises UnsupportedDtype for float64 and complex, UsageError for
    operands that do not fit or lie on different devices, NativeError where the GPU library is missing or refuses.
    """
    if path is None:
        return _forms.linear(x, weight, bias)
    if path not in (*PATHS, "wide"):
        raise UsageError(f"linear: there is no path {path!r}; choose {', '.join(PATHS)} or wide")
    shape, rows, w, c = linear_views(x, weight, bias)
    return product(rows, w.t(), c, path=path).view(shape)


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
    """Compare ``op`` with the reference on this GPU, on stress inputs: (results compared, their bytes).

    Raises Diverged with the first difference, UnsupportedDtype for a dtype without an order.
    """
    from detinfer.ops import matmul_cuda_proof

    if dtype not in native.DTYPES:
        raise UnsupportedDtype(f"{op}: {dtype} has no canonical order on a GPU; use float32, bfloat16 or float16")
    return matmul_cuda_proof.prove(op, dtype, COVERED[op])
