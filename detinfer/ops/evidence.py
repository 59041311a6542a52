"""What every proof is made of: stored bits as tensors, stress inputs, and the comparison that raises Diverged."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from detinfer.bits import dtype_name, first_mismatch
from detinfer.errors import Diverged
from detinfer.reference.arithmetic import CANONICAL_NAN, Bits, DType, Float, load, store

WIDTHS = (1, 15, 49, 77, 100, 1000, 2890)
"""Row lengths that are no multiple of any vector."""

REFERENCE_NAME: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


_FEW = np.array([1, -1, 2, -2, 0.5, 3], np.float32)


def from_bits(bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    """A tensor with these bytes: uint32 for fp32, uint16 for bf16 and fp16."""
    signed = np.asarray(bits, order="C").view(np.int32 if dtype is torch.float32 else np.int16)
    return torch.from_numpy(signed).view(dtype)


def to_bits(x: torch.Tensor) -> Bits:
    """The tensor's bytes as uint32 or uint16."""
    signed = x.contiguous().view(torch.int32 if x.dtype is torch.float32 else torch.int16)
    return signed.numpy().view(np.uint32 if x.dtype is torch.float32 else np.uint16)


def to_values(x: torch.Tensor) -> Float:
    """The tensor's values as float32."""
    return load(to_bits(x), REFERENCE_NAME[x.dtype])


def from_values(values: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of float32 values rounded once to ``dtype``."""
    return from_bits(store(values, REFERENCE_NAME[dtype]), dtype)


class Evidence:
    """The comparisons of one proof: ``expect`` each result, then ``total``."""

    def __init__(self, op: str, dtype: torch.dtype) -> None:
        self._subject = f"{op} on {dtype_name(dtype)}"
        self._cases = 0
        self._bytes: list[bytes] = []

    def expect(self, got: torch.Tensor, expected: torch.Tensor, where: str) -> None:
        """Compare bytes; Diverged names the place of the first difference. Counts every element."""
        if got.dtype != expected.dtype or got.shape != expected.shape:
            raise Diverged(
                f"{self._subject}, {where}: {got.dtype} {list(got.shape)}, expected {expected.dtype} "
                f"{list(expected.shape)}: this machine's kernel is another operation; report it"
            )
        if (found := first_mismatch(got, expected)) is not None:
            raise Diverged(f"{self._subject}, {where}: {found}: do not use this kernel; report it")
        self._cases += got.numel()
        self._bytes.append(to_bits(got).tobytes() if got.is_floating_point() else got.contiguous().numpy().tobytes())

    def total(self) -> tuple[int, bytes]:
        """(results compared, their bytes)."""
        return self._cases, b"".join(self._bytes)


@functools.cache
def every_exponent(dtype: torch.dtype, count: int = 3000) -> torch.Tensor:
    """``count`` values spread over all bit patterns of ``dtype``, special values first; read it only.

    Signed zeros, infinities, both kinds of NaN, the least subnormal and the least normal, one and two are among them.
    """
    if dtype is torch.float32:
        special = np.array([0, 1, 0x00800000, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 0x7F800001], np.uint32)
        special = np.concatenate([special, special | 0x80000000, _FEW.view(np.uint32)])
        spread = np.arange(count - len(special), dtype=np.uint64) * (0xFFFFFFFF // count) + 77
        return from_bits(np.concatenate([special, spread.astype(np.uint32)]), dtype)
    name = REFERENCE_NAME[dtype]
    one = store(_FEW, name)
    infinity = int(store(np.array([np.inf], np.float32), name)[0])
    special = np.array([0, 1, infinity - 1, infinity, infinity + 1, CANONICAL_NAN[name]], np.uint16)
    special = np.concatenate([special, special | 0x8000, one])
    spread = np.arange(count - len(special), dtype=np.uint64) * (0xFFFF // count) + 7
    return from_bits(np.concatenate([special, spread.astype(np.uint16)]), dtype)
