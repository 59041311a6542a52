"""linear on NVIDIA GPUs in bf16 and fp16: one accumulator for each output, k ascending, whatever the number of rows.

Three paths give the same bits, so which one runs is a matter of speed: ``skinny``, csrc's kernel for up to 64 rows;
``cublaslt_no_split``, cuBLASLt held to one chain of k, where ``prove`` has compared it on this machine; ``reference``,
plain and slow, for any strides. Rows for which no proof was made are cut into pieces that have one, or into 64.

The order is that of csrc/matmul_gpu.h. That the tiles of cuBLASLt do not change it, while split-K does, is measured in
docs/ops/matmul.md.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from detinfer import native
from detinfer.bits import first_mismatch
from detinfer.errors import Diverged, NativeError, UnsupportedDtype, UsageError

SKINNY_ROWS = 64
"""Rows of x that one call of the kernel for few rows takes."""

PROVED_ROWS = (128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of rows for which ``prove`` compares cuBLASLt; others are cut into these."""

_DTYPES = {torch.bfloat16: 1, torch.float16: 2}
_PATHS = {"reference": 0, "skinny": 1}
_args = struct.Struct("@2i10q4P")  # GpuMatmulArgs of csrc/matmul_gpu.h


@dataclass(frozen=True)
class Key:
    """What may pick another kernel of cuBLASLt, but for the number of rows: a proof holds for one key."""

    n: int
    k: int
    dtype: torch.dtype
    weight_stride: int
    device: int


@dataclass(frozen=True)
class Proof:
    """cuBLASLt without split-K gave the kernel's bytes at ``rows`` rows each; ``compared`` elements in all."""

    key: Key
    rows: tuple[int, ...]
    compared: int


_proofs: dict[Key, Proof] = {}


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


def _run(path: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    run, error = _function()
    args = _args.pack(
        *(_DTYPES[x.dtype], _PATHS[path], x.shape[0], weight.shape[0], x.shape[1], *x.stride(), *weight.stride()),
        *(0 if bias is None else bias.stride(0), *out.stride(), x.data_ptr(), weight.data_ptr()),
        *(0 if bias is None else bias.data_ptr(), out.data_ptr()),
    )
    with torch.cuda.device(x.device):
        if run(args, torch.cuda.current_stream(x.device).cuda_stream):
            raise NativeError((error() or b"").decode())


def _streams(t: torch.Tensor) -> bool:
    """Whether the kernel for few rows and cuBLASLt's aligned kernels take a [rows, k] operand as it lies."""
    rows, k = t.shape
    return k % 8 == 0 and t.stride(1) == 1 and (rows == 1 or t.stride(0) % 8 == 0) and t.data_ptr() % 16 == 0


def pieces(rows: int, proved: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """(start, rows, path) of each piece of a product: the greatest proved sizes first, then at most 64 rows at a time."""
    start = 0
    while start < rows:
        left = rows - start
        size = next((p for p in sorted(proved, reverse=True) if p <= left), 0)
        yield start, size or min(left, SKINNY_ROWS), "cublaslt_no_split" if size else "skinny"
        start += size or SKINNY_ROWS


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, path: str | None = None
) -> torch.Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N] or none, to [..., N]: bf16 or fp16, on one GPU.

    The bias is added in fp32 before the one rounding. ``path`` holds the whole product to ``skinny`` (in pieces of 64
    rows) or ``reference``. Raises UnsupportedDtype for other dtypes, UsageError for operands that do not fit or lie on
    different devices, NativeError where the GPU library is missing or refuses.
    """
    _check(x, weight, bias)
    if path not in (None, *_PATHS):
        raise UsageError(f"linear: there is no path {path!r}; choose skinny or reference")
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    flat = out.view(-1, weight.shape[0])
    if path == "reference" or (path is None and not _streams(weight)):
        _run("reference", rows, weight, bias, flat)
        return out
    if not _streams(rows):
        rows = rows.clone(memory_format=torch.contiguous_format)  # a buffer of torch's is aligned
    key = Key(weight.shape[0], weight.shape[1], x.dtype, weight.stride(0), x.device.index)
    proof = _proofs.get(key) if path is None and bias is None else None
    for start, count, chosen in pieces(len(rows), proof.rows if proof else ()):
        piece, target = rows[start : start + count], flat[start : start + count]
        if chosen == "skinny":
            _run("skinny", piece, weight, bias, target)
        else:
            with no_split():
                torch.mm(piece, weight.t(), out=target)
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    tensors = [t for t in (x, weight, bias) if t is not None]
    if any(t.dtype not in _DTYPES for t in tensors):
        found = ", ".join(str(t.dtype) for t in tensors)
        raise UnsupportedDtype(f"linear on a GPU: {found}; use bfloat16 or float16")
    if len({t.dtype for t in tensors}) > 1 or len({t.device for t in tensors}) > 1 or x.device.type != "cuda":
        found = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise UsageError(f"linear on a GPU: operands are {found}; they must have one dtype and lie on one GPU")
    fits = x.dim() >= 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise UsageError(
            f"linear on a GPU: operands of shapes {shapes} do not fit: x [..., K], weight [N, K], bias [N]"
        )


@contextmanager
def no_split() -> Iterator[None]:
    """cuBLASLt, and no split of k, inside the block: torch's settings of the process, put back at the end."""
    flags, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    library = cuda.preferred_blas_library()
    bf16, fp16 = flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction
    cuda.preferred_blas_library("cublaslt")
    # (reduced precision in the reduction, split-K): torch 2.10 and newer take the pair.
    flags.allow_bf16_reduced_precision_reduction = flags.allow_fp16_reduced_precision_reduction = (False, False)
    try:
        yield
    finally:
        cuda.preferred_blas_library(library)
        flags.allow_bf16_reduced_precision_reduction = bf16
        flags.allow_fp16_reduced_precision_reduction = fp16


def adversarial(rows: int, k: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """[rows, k] in which an order shows: exponents spread over nine bits, and two large columns, whose products cancel
    where the other operand holds one value in both: next to them fp32 keeps few bits of the small terms."""
    draw = torch.Generator(device).manual_seed(seed)
    values = torch.randint(-127, 128, (rows, k), generator=draw, device=device).float()
    values = torch.ldexp(values, torch.randint(-12, -3, (rows, k), generator=draw, device=device))
    if k >= 16:
        values[:, 1], values[:, k - k // 7 - 1] = 300.0, -300.0
    return values.to(dtype)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bytes are equal, found on the GPU: a proof compares gigabytes."""
    return bool((a.contiguous().view(torch.int16) == b.contiguous().view(torch.int16)).all())


def prove(weight: torch.Tensor, rows: Sequence[int] = PROVED_ROWS) -> Proof:
    """Compare cuBLASLt without split-K with the kernel for few rows, every element, for one shape of weight [N, K].

    The inputs are made for the shape; the values of ``weight`` are not read. Raises Diverged where a byte differs, or
    where the inputs do not show a reversed order: a proof on them would prove nothing.
    """
    _check(weight, weight, None)
    if not _streams(weight):
        raise UsageError("prove: rows of the weight must be contiguous and start on 16-byte boundaries")
    n, k = weight.shape
    key = Key(n, k, weight.dtype, weight.stride(0), weight.device.index)
    storage = torch.empty(n * weight.stride(0), dtype=weight.dtype, device=weight.device)
    w = storage.as_strided((n, k), (weight.stride(0), 1)).copy_(adversarial(n, k, weight.dtype, weight.device, 1))
    compared = 0
    for count in rows:
        x = adversarial(count, k, weight.dtype, weight.device, count)
        if k >= 16:
            x[:, 1] = x[:, k - k // 7 - 1] = 900.0
        expected = linear(x, w, path="skinny")
        with no_split():
            found = torch.mm(x, w.t())
        if not _same(found, expected):
            mismatch = first_mismatch(found, expected)
            raise Diverged(f"cuBLASLt without split-K at {count} x {k} x {n} in {weight.dtype}: {mismatch}")
        compared += found.numel()
    small = slice(0, min(n, 64))
    turned = linear(x[:64].flip(1), w[small].flip(1).contiguous(), path="skinny")
    if _same(turned, expected[:64, small]):
        raise Diverged(f"the inputs do not show a reversed order at k = {k}: nothing was proved")
    proof = _proofs[key] = Proof(key, tuple(rows), compared)
    return proof
