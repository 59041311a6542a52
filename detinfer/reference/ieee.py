"""What one IEEE rounding per element gives: numpy's float32 arithmetic, comparisons and choices.

Each function takes float32 arrays that hold values of the storage dtype, and scalars already rounded as torch rounds
them; the caller rounds the float32 result once to the storage dtype. Which of two equal zeros a choice returns is
written out: it is part of the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

ZERO = np.float32(0)


def clamp_min(x: Any, low: Any) -> Any:
    """``low`` where x is less, else x: a zero keeps its sign, NaN stays."""
    return np.where(x < low, low, x)


def clamp_max(x: Any, high: Any) -> Any:
    """``high`` where x is greater, else x."""
    return np.where(x > high, high, x)


def first_greatest(x: Any) -> Any:
    """[rows, n] to [rows]: the index of the first NaN, else of the first greatest element; +0 equals -0."""
    nan = np.isnan(x)
    index = np.argmax(np.where(nan, np.float32(-np.inf), x), axis=1)
    return np.where(nan.any(axis=1), np.argmax(nan, axis=1), index)


def first_least(x: Any) -> Any:
    """[rows, n] to [rows]: the index of the first NaN, else of the first least element."""
    return first_greatest(-x)


UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": lambda x: -x,
    "abs": np.abs,
    "reciprocal": lambda x: np.float32(1) / x,
    "relu": lambda x: clamp_min(x, ZERO),
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.rint,
    "trunc": np.trunc,
    "frac": lambda x: x - np.trunc(x),
    "sign": lambda x: np.where(x > 0, np.float32(1), np.where(x < 0, np.float32(-1), ZERO)),
    "sgn": lambda x: np.where(x > 0, np.float32(1), np.where(x < 0, np.float32(-1), ZERO)),
    "isnan": np.isnan,
    "isinf": np.isinf,
    "isposinf": lambda x: x == np.inf,
    "isneginf": lambda x: x == -np.inf,
    "signbit": np.signbit,
    "logical_not": lambda x: x == 0,
}
"""Functions of one operand; those that answer a question give booleans."""

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "rsub": lambda x, y: y - x,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "logical_and": lambda x, y: (x != 0) & (y != 0),
    "logical_or": lambda x, y: (x != 0) | (y != 0),
    "logical_xor": lambda x, y: (x != 0) ^ (y != 0),
    "copysign": np.copysign,
}
"""Functions of two operands."""
