"""Bytes of tensors: digests, row digests, comparison, the first mismatch, ULP distance.

Bits means bytes. -0.0 and +0.0 differ, NaN payloads count, and nothing is rounded or tolerated: `torch.equal` would
say that -0.0 equals +0.0 and that a NaN differs from itself.

A **row** is the last dimension, all the dimensions before it flattened; a tensor of 0 or 1 dimensions is one row.
On the CPU comparison and hashing run on numpy's views of the same memory and on one thread: on a busy machine, waking
torch's threads for a comparison costs more than the comparison. Two tensors of one GPU are compared there, and what
comes back is one bool for each row. Digests are always taken on the host.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from detinfer.errors import UnsupportedDtype

P = ParamSpec("P")
R = TypeVar("R")

ROW_DIGEST_BYTES = 8

Value = bool | int | float | complex
"""What ``Tensor.item`` gives."""

_ULP_CODES: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
}


@dataclass(frozen=True)
class Mismatch:
    """The first place, in row-major order, where two tensors differ.

    ``flat`` counts elements from the start, ``index`` is the same place by dimension; ``row`` and ``element`` are its
    row and its place in that row. ``got`` and ``expected`` are the bits of the first and the second tensor in hex, most
    significant digit first (``0x3f80``), ``got_value`` and ``expected_value`` what they stand for. ``ulp`` is their
    distance in units in the last place: None if either is NaN or the dtype is not fp32, bf16 or fp16, and 0 for the
    two zeros, which differ in their sign alone.
    """

    flat: int
    index: tuple[int, ...]
    row: int
    element: int
    got: str
    expected: str
    got_value: Value
    expected_value: Value
    ulp: int | None

    def __str__(self) -> str:
        got, expected = f"{self.got} ({self.got_value})", f"{self.expected} ({self.expected_value})"
        apart = "" if self.ulp is None else f", {self.ulp} ULP"
        return f"row {self.row}, element {self.element}: {got}, expected {expected}{apart}"


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` past every dispatch mode: looking at a tensor is no operation of the model under a policy."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if _get_current_dispatch_mode() is None:
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return wrapped


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype without its module: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def rows_of(shape: torch.Size | tuple[int, ...], ndim_rows: int = 1) -> tuple[int, int]:
    """(number of rows, elements in a row) of a tensor of ``shape`` whose rows are its last ``ndim_rows`` dimensions."""
    if ndim_rows < 1:
        raise ValueError(f"ndim_rows is {ndim_rows}: a row has at least one dimension")
    cut = max(len(shape) - ndim_rows, 0)
    return math.prod(shape[:cut]), math.prod(shape[cut:])


def _check_dense(t: torch.Tensor) -> None:
    if t.layout != torch.strided or t.is_quantized or t.is_nested:
        kind = "quantized" if t.is_quantized else "nested" if t.is_nested else str(t.layout)
        raise ValueError(f"a {kind} tensor has no single row of bytes: convert it to a dense tensor first")
    if t.device.type == "meta":
        raise ValueError("a tensor on the meta device has no bytes")


def _flat_bytes(t: torch.Tensor) -> NDArray[np.uint8]:
    """The tensor's bytes in row-major order, in this machine's byte order; no copy where it is contiguous already."""
    _check_dense(t)
    plain = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
    flat = plain.reshape(-1)
    if flat.stride() != (1,):  # one element of a strided tensor counts as contiguous, whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    array: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array


def _little_endian(array: NDArray[np.uint8], dtype: torch.dtype) -> NDArray[np.uint8]:
    if sys.byteorder == "little":
        return array
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    return np.ascontiguousarray(array.reshape(-1, width)[:, ::-1]).reshape(-1)


def _stored(t: torch.Tensor) -> NDArray[np.uint8]:
    return _little_endian(_flat_bytes(t), t.dtype)


@unseen
def as_bytes(t: torch.Tensor) -> bytes:
    """The elements' bytes, little-endian, in row-major order: any dtype, shape, strides and device.

    Raises ValueError for a tensor without dense bytes (sparse, nested, quantized, meta).
    """
    return _stored(t).tobytes()


@unseen
def as_memory(t: torch.Tensor) -> memoryview:
    """The bytes of ``as_bytes`` without a copy where the tensor is contiguous on CPU: it must not change meanwhile."""
    return _stored(t).data


@unseen
def digest(t: torch.Tensor) -> str:
    """SHA-256, in hex, of ``<dtype>[<shape, comma-separated>]`` + newline, then the tensor's bytes.

    ``bfloat16[2,3]`` is such a header, so equal bytes of another dtype or shape have another digest.
    """
    header = f"{dtype_name(t.dtype)}[{','.join(map(str, t.shape))}]\n"
    whole = hashlib.sha256(header.encode())
    whole.update(as_memory(t))
    return whole.hexdigest()


@unseen
def row_digests(t: torch.Tensor, ndim_rows: int = 1) -> torch.Tensor:
    """blake2b of 8 bytes of each row's bytes: uint8 [rows, 8], on CPU.

    Rows are the last ``ndim_rows`` dimensions. 8 bytes tell rows apart; they do not resist an attacker.
    """
    rows, elements = rows_of(t.shape, ndim_rows)
    data, width = as_memory(t), elements * t.dtype.itemsize
    found = np.empty((rows, ROW_DIGEST_BYTES), dtype=np.uint8)
    for i in range(rows):
        row = hashlib.blake2b(data[i * width : (i + 1) * width], digest_size=ROW_DIGEST_BYTES)
        found[i] = np.frombuffer(row.digest(), dtype=np.uint8)
    return torch.from_numpy(found)


def _check_alike(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype != b.dtype:
        raise ValueError(f"dtypes differ: {dtype_name(a.dtype)} against {dtype_name(b.dtype)}")
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {list(a.shape)} against {list(b.shape)}")


def _both(a: torch.Tensor, b: torch.Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    _check_alike(a, b)
    return _flat_bytes(a), _flat_bytes(b)


def _words(array: NDArray[np.uint8], width: int) -> NDArray[Any]:
    """[n, width] bytes as the widest integers that divide ``width``."""
    for size, kind in ((8, np.uint64), (4, np.uint32), (2, np.uint16)):
        if width % size == 0:
            return array.view(kind).reshape(-1, width // size)
    return array.reshape(-1, width)


def _equal(a: torch.Tensor, b: torch.Tensor, count: int, elements: int) -> NDArray[np.bool_]:
    """bool [count]: which of ``count`` runs of ``elements`` elements have the same bytes."""
    if a.device == b.device and a.device.type == "cuda":
        found: NDArray[np.bool_] = _equal_there(a, b, count, elements).cpu().numpy()
        return found
    x, y = _both(a, b)
    width = elements * a.dtype.itemsize
    if count == 0 or width == 0:
        return np.ones(count, dtype=np.bool_)
    same: NDArray[np.bool_] = (_words(x, width) == _words(y, width)).all(axis=1)
    return same


def _equal_there(a: torch.Tensor, b: torch.Tensor, count: int, elements: int) -> torch.Tensor:
    """``_equal`` by torch's own integer operations, on the device that both tensors lie on."""
    _check_alike(a, b)
    if count == 0 or elements == 0:
        return torch.ones(count, dtype=torch.bool, device=a.device)
    return (_words_there(a, count) == _words_there(b, count)).all(dim=1)


def _words_there(t: torch.Tensor, count: int) -> torch.Tensor:
    """[count, n] integers: the tensor's bytes where it lies, in words of its dtype's width or less."""
    _check_dense(t)
    flat = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.stride() != (1,):
        flat = flat.clone(memory_format=torch.contiguous_format)
    # One word for each element: a view as a wider one would need another alignment of the address.
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[min(flat.dtype.itemsize, 8)]
    return flat.view(kind).reshape(count, -1)


@unseen
def rows_equal(a: torch.Tensor, b: torch.Tensor, ndim_rows: int = 1) -> torch.Tensor:
    """bool [rows], on CPU: which rows have the same bytes. ValueError if dtypes or shapes differ."""
    rows, elements = rows_of(a.shape, ndim_rows)
    return torch.from_numpy(_equal(a, b, rows, elements))


@unseen
def count_mismatches(a: torch.Tensor, b: torch.Tensor) -> int:
    """Number of elements whose bytes differ. ValueError if dtypes or shapes differ."""
    return sum(int(np.count_nonzero(~_equal(x, y, x.numel(), 1))) for x, y in _pieces(a, b))


@unseen
def first_mismatch(got: torch.Tensor, expected: torch.Tensor) -> Mismatch | None:
    """The first element whose bytes differ; None if all are the same. ValueError if dtypes or shapes differ."""
    start = 0
    for x, y in _pieces(got, expected):
        differs = ~_equal(x, y, x.numel(), 1)
        if differs.any():
            return _mismatch(got, expected, start + int(differs.argmax()))
        start += x.numel()
    return None


def _mismatch(got: torch.Tensor, expected: torch.Tensor, flat: int) -> Mismatch:
    index = tuple(int(i) for i in np.unravel_index(flat, tuple(got.shape)))
    row, element = divmod(flat, rows_of(got.shape)[1])
    x, y = got[index].detach().cpu(), expected[index].detach().cpu()
    apart = int(ulp_distance(x, y)) if got.dtype in _ULP_CODES else -1
    ulp = None if apart < 0 else apart
    return Mismatch(flat, index, row, element, _hex(x), _hex(y), x.item(), y.item(), ulp)


PIECE = 1 << 24
"""Elements that are looked at together, so that a bool or a distance for each takes little memory."""


def _pieces(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors flat, PIECE elements at a time; at least one pair."""
    _check_alike(a, b)
    if a.numel() <= PIECE:
        yield a, b
        return
    x, y = a.detach().reshape(-1), b.detach().reshape(-1)
    for start in range(0, x.numel(), PIECE):
        yield x[start : start + PIECE], y[start : start + PIECE]


@unseen
def ulp_histogram(a: torch.Tensor, b: torch.Tensor) -> dict[str, int]:
    """How many elements are how far apart: ``0`` (the sign of a zero), ``1``, ``2``, ``3-4``, ``5-8`` and so on, ``nan``.

    Only elements whose bytes differ are counted; fp32, bf16 and fp16 of one shape.
    """
    nan = zero = 0
    found: dict[int, int] = {}
    for x, y in _pieces(a, b):
        differs = torch.from_numpy(~_equal(x, y, x.numel(), 1)).reshape(x.shape).to(x.device)
        apart = ulp_distance(x[differs], y[differs]).cpu().numpy()
        nan, zero = nan + int((apart < 0).sum()), zero + int((apart == 0).sum())
        steps = np.ceil(np.log2(apart[apart > 0].astype(np.float64))).astype(np.int64)
        for step, count in zip(*np.unique(steps, return_counts=True), strict=True):
            found[int(step)] = found.get(int(step), 0) + int(count)
    named = {"nan": nan, "0": zero}
    for step in sorted(found):
        low, high = (1 << step) // 2 + 1, 1 << step
        named[f"{low}-{high}" if low < high else str(high)] = found[step]
    return {name: count for name, count in named.items() if count}


def has_ulp(dtype: torch.dtype) -> bool:
    """Whether ``ulp_distance`` takes tensors of this dtype."""
    return dtype in _ULP_CODES


def _hex(element: torch.Tensor) -> str:
    return "0x" + as_bytes(element)[::-1].hex()


@unseen
def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int64, of the tensors' shape: how many representable values apart two elements are; -1 where either is NaN.

    Infinity is one step past the largest finite value; the two zeros are 0 apart. fp32, bf16 and fp16 only.
    """
    if a.dtype not in _ULP_CODES:
        raise UnsupportedDtype(f"ULP distance of {a.dtype}: use float32, bfloat16 or float16")
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ValueError(f"{a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}: dtype and shape must match")
    code, magnitude = _ULP_CODES[a.dtype]

    def position(t: torch.Tensor) -> torch.Tensor:
        bits = t.detach().contiguous().view(code).to(torch.int64)
        return torch.where(bits < 0, -(bits & magnitude), bits)

    apart = (position(a) - position(b)).abs()
    return torch.where(a.isnan() | b.isnan(), torch.full_like(apart, -1), apart)
