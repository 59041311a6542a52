"""fp32 arithmetic in numpy: the fused multiply-add, rounding to the storage dtypes, the canonical NaN.

Values are numpy arrays of float32; a stored tensor is its bits, uint32 for fp32 and uint16 for bf16 and fp16. numpy's
own +, -, *, / and sqrt on float32 and float64 arrays are the IEEE operations, one rounding each.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Double = NDArray[np.float64]
Bits = NDArray[Any]
"""uint32 or uint16: the bytes of a stored tensor."""

DType = Literal["float32", "bfloat16", "float16"]

CANONICAL_NAN = {"float32": 0x7FFFFFFF, "bfloat16": 0x7FFF, "float16": 0x7FFF}


def single(x: Any) -> Float:
    """Round to nearest even to float32, with subnormal results and overflow to infinity."""
    with np.errstate(all="ignore"):
        return np.asarray(x).astype(np.float32)


def fma(a: Any, b: Any, c: Any) -> Float:
    """a * b + c in float32 with one rounding.

    The product of two float32 is exact in float64. The sum is rounded to odd there (an inexact result gets a last bit
    of 1), after which rounding to float32 cannot be misled: float64 has more than twice float32's bits plus two.
    """
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
        addend = np.asarray(c, np.float32).astype(np.float64)
        total = np.atleast_1d(product + addend)
        part = total - product
        lost = (product - (total - part)) + (addend - part)
        bits = total.view(np.int64)
        inexact = (lost != 0) & np.isfinite(total) & (bits & 1 == 0)
        away = (lost > 0) == (total > 0)
        odd = np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(np.float64)
        return odd.astype(np.float32).reshape(np.broadcast(product, addend).shape)


def load(bits: Bits, dtype: DType) -> Float:
    """Stored bits as float32 values, exactly."""
    if dtype == "float32":
        return np.ascontiguousarray(bits, np.uint32).view(np.float32)
    if dtype == "bfloat16":
        return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)


def store(values: Float, dtype: DType) -> Bits:
    """Round float32 values once to ``dtype``, to nearest even, and give the bits; NaN becomes the canonical NaN."""
    values = np.asarray(values, np.float32, order="C")
    bits: Bits
    if dtype == "float32":
        bits = values.view(np.uint32)
    elif dtype == "bfloat16":
        wide = values.view(np.uint32).astype(np.uint64)
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    else:
        with np.errstate(all="ignore"):
            bits = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), bits.dtype.type(CANONICAL_NAN[dtype]), bits)


def rounded(values: Float, dtype: DType) -> Float:
    """The float32 values that are left after rounding to ``dtype``."""
    return load(store(values, dtype), dtype)
