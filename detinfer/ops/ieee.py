"""Operations that torch's own CPU kernels compute with one IEEE rounding per element, or exactly.

Such an operation has one result whatever kernel runs it, as long as the kernel is honest: torch's vector body, its
scalar tail and its strided loop are compared here with numpy's fp32 arithmetic, rounded once to the dtype. What a NaN
looks like (sign, payload) is left to torch: x86 takes it from one of the operands, and which one may differ between
the vector body and the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from detinfer.errors import RefusedError
from detinfer.ops.evidence import WIDTHS, Evidence, every_exponent, from_bits, from_values, to_bits, to_values
from detinfer.reference.arithmetic import Float

ROWS = 2
SCALARS = (0.375, -3.0, 1e-5)

Torch = Callable[..., Any]
Numpy = Callable[..., Any]


def _quiet(function: Numpy) -> Numpy:
    def inside(*values: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*values)

    return inside


# Operations of two tensors, or of a tensor and a number: torch's, numpy's on float32, overloads.
_BINARY: dict[str, tuple[Torch, Numpy, tuple[str, ...]]] = {
    "aten::add": (torch.add, np.add, ("Tensor", "Scalar")),
    "aten::sub": (torch.sub, np.subtract, ("Tensor", "Scalar")),
    "aten::rsub": (torch.rsub, lambda x, y: np.subtract(y, x), ("Tensor", "Scalar")),
    "aten::mul": (torch.mul, np.multiply, ("Tensor", "Scalar")),
    "aten::div": (torch.div, np.divide, ("Tensor", "Scalar")),
    "aten::maximum": (torch.maximum, lambda x, y: _largest(x, y), ("",)),
    "aten::minimum": (torch.minimum, lambda x, y: _smallest(x, y), ("",)),
    "aten::eq": (torch.eq, np.equal, ("Tensor", "Scalar")),
    "aten::ne": (torch.ne, np.not_equal, ("Tensor", "Scalar")),
    "aten::lt": (torch.lt, np.less, ("Tensor", "Scalar")),
    "aten::le": (torch.le, np.less_equal, ("Tensor", "Scalar")),
    "aten::gt": (torch.gt, np.greater, ("Tensor", "Scalar")),
    "aten::ge": (torch.ge, np.greater_equal, ("Tensor", "Scalar")),
    "aten::logical_and": (torch.logical_and, np.logical_and, ("",)),
    "aten::logical_or": (torch.logical_or, np.logical_or, ("",)),
}

_UNARY: dict[str, tuple[Torch, Numpy]] = {
    "aten::neg": (torch.neg, np.negative),
    "aten::abs": (torch.abs, np.abs),
    "aten::sqrt": (torch.sqrt, np.sqrt),
    "aten::reciprocal": (torch.reciprocal, lambda x: np.float32(1) / x),
    "aten::relu": (torch.relu, lambda x: np.where(x < 0, np.float32(0), x)),  # -0 stays
    "aten::floor": (torch.floor, np.floor),
    "aten::ceil": (torch.ceil, np.ceil),
    "aten::trunc": (torch.trunc, np.trunc),
    "aten::round": (torch.round, np.rint),
    "aten::isnan": (torch.isnan, np.isnan),
    "aten::isinf": (torch.isinf, np.isinf),
    "aten::isfinite": (torch.isfinite, np.isfinite),
    "aten::logical_not": (torch.logical_not, np.logical_not),
    "aten::clamp_min": (lambda x: torch.clamp_min(x, -0.5), lambda x: np.where(np.isnan(x), x, np.maximum(x, -0.5))),
    "aten::clamp_max": (lambda x: torch.clamp_max(x, 1.5), lambda x: np.where(np.isnan(x), x, np.minimum(x, 1.5))),
    "aten::clamp": (
        lambda x: torch.clamp(x, -0.5, 1.5),
        lambda x: np.where(np.isnan(x), x, np.minimum(np.maximum(x, -0.5), 1.5)),
    ),
    "aten::masked_fill.Scalar": (
        lambda x: x.masked_fill(x > 0.5, -3.0),
        lambda x: np.where(x > 0.5, np.float32(-3), x),
    ),
    "aten::where.self": (lambda x: torch.where(x > 0.5, x, x * 0), lambda x: np.where(x > 0.5, x, x * np.float32(0))),
}

# Along the last dimension: order-free, and ties go to the lower index.
_CHOICES: dict[str, tuple[Torch, Numpy]] = {
    "aten::amax": (lambda x: x.amax(-1), lambda x: x.max(-1)),
    "aten::amin": (lambda x: x.amin(-1), lambda x: x.min(-1)),
    "aten::max.dim": (lambda x: x.max(-1), lambda x: (x.max(-1), x.argmax(-1))),
    "aten::min.dim": (lambda x: x.min(-1), lambda x: (x.min(-1), x.argmin(-1))),
    "aten::argmax": (lambda x: x.argmax(-1), lambda x: x.argmax(-1)),
    "aten::argmin": (lambda x: x.argmin(-1), lambda x: x.argmin(-1)),
}

# Casts: one rounding to the dtype asked for.
_CASTS = ("aten::to.dtype", "aten::to.dtype_layout", "aten::to.other", "aten::to.device", "aten::_to_copy")


def _names() -> tuple[str, ...]:
    binary = (
        f"{op}.{overload}" if overload else op for op, (_, _, overloads) in _BINARY.items() for overload in overloads
    )
    return (*binary, *_UNARY, *_CHOICES, *_CASTS)


IEEE: tuple[str, ...] = _names()
"""Names of operations, as torch spells them."""


def _largest(x: Float, y: Float) -> Any:
    return np.where(np.isnan(x), x, np.where(np.isnan(y), y, np.where(x > y, x, y)))


def _smallest(x: Float, y: Float) -> Any:
    return np.where(np.isnan(x), x, np.where(np.isnan(y), y, np.where(x < y, x, y)))


def prove_ieee(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare torch's result with IEEE arithmetic; RefusedError for an operation that is not in ``IEEE``."""
    evidence = Evidence(op, dtype)
    base, _, overload = op.partition(".")
    if op in _UNARY:
        function, reference = _UNARY[op]
        for x, where in _layouts(dtype):
            _expect(evidence, function(x), _quiet(reference)(to_values(x)), dtype, where)
    elif op in _CHOICES:
        _prove_choice(evidence, *_CHOICES[op], dtype)
    elif op in _CASTS:
        _prove_cast(evidence, dtype)
    elif base in _BINARY and overload in _BINARY[base][2]:
        function, reference, _ = _BINARY[base]
        if overload == "Scalar":
            _prove_with_numbers(evidence, function, _quiet(reference), dtype)
        else:
            _prove_binary(evidence, function, _quiet(reference), dtype)
            if overload == "Tensor":  # a number comes as a tensor without dimensions
                _prove_with_numbers(evidence, function, _quiet(reference), dtype)
    else:
        raise RefusedError(f"{op} is not among the operations that round once per element: {', '.join(IEEE)}")
    return evidence.total()


def _layouts(dtype: torch.dtype, start: int = 0) -> Sequence[tuple[torch.Tensor, str]]:
    """Rows of every width, contiguous and with a stride of two, special values among them."""
    values = every_exponent(dtype).roll(start)
    found = []
    for width in WIDTHS:
        rows = values[torch.arange(ROWS * width) % values.numel()].reshape(ROWS, width)
        spread = torch.zeros(ROWS, 2 * width, dtype=dtype)
        spread[:, ::2] = rows
        found += [(rows, f"width {width}"), (spread[:, ::2], f"width {width}, stride 2")]
    return found


def _prove_binary(evidence: Evidence, function: Torch, reference: Numpy, dtype: torch.dtype) -> None:
    for (x, where), (y, _) in zip(_layouts(dtype), _layouts(dtype, 997), strict=True):
        # Whole, a row for all rows, a column for all columns.
        for other, how in ((y, ""), (y[1], ", a row"), (y[:, :1], ", a column"))[: 3 if x.is_contiguous() else 1]:
            expected = reference(to_values(x), to_values(other))
            _expect(evidence, function(x, other), expected, dtype, where + how)


def _prove_with_numbers(evidence: Evidence, function: Torch, reference: Numpy, dtype: torch.dtype) -> None:
    for number in SCALARS[: 3 if dtype is torch.float32 else 2]:
        for x, where in _layouts(dtype)[::2]:
            expected = reference(to_values(x), np.float32(number))
            _expect(evidence, function(x, number), expected, dtype, f"{where}, with {number}")


def _prove_choice(evidence: Evidence, function: Torch, reference: Numpy, dtype: torch.dtype) -> None:
    finite = every_exponent(dtype)
    finite = finite[torch.isfinite(finite) & (finite != 0)]
    for width in WIDTHS:
        # Every width twice over, so that every value has a tie further on.
        half = finite[torch.arange(ROWS * width) * 7 % finite.numel()].reshape(ROWS, width)
        rows = torch.cat([half, half], 1)
        got, expected = function(rows), reference(to_values(rows))
        parts = zip(got, expected, strict=True) if isinstance(expected, tuple) else ((got, expected),)
        for mine, theirs in parts:
            _expect(evidence, mine, theirs, dtype, f"width {2 * width}")


def _prove_cast(evidence: Evidence, dtype: torch.dtype) -> None:
    for x, where in _layouts(dtype):
        for wanted in (torch.float32, torch.bfloat16, torch.float16):
            _expect(evidence, x.to(wanted), to_values(x), wanted, f"{where}, to {wanted}")
    whole = torch.arange(-3000, 3000)
    _expect(evidence, whole.to(dtype), whole.numpy().astype(np.float32), dtype, "from int64")


def _expect(evidence: Evidence, got: torch.Tensor, expected: Any, dtype: torch.dtype, where: str) -> None:
    """Compare bytes, every NaN standing for every other."""
    if got.is_floating_point():
        evidence.expect(_one_nan(got), _one_nan(from_values(np.asarray(expected, np.float32), dtype)), where)
    else:
        evidence.expect(got.contiguous(), torch.from_numpy(np.array(expected)).to(got.dtype), where)


def _one_nan(x: torch.Tensor) -> torch.Tensor:
    bits = to_bits(x).copy()
    bits[np.isnan(to_values(x))] = 0x7FFFFFFF if x.dtype is torch.float32 else 0x7FFF
    return from_bits(bits, x.dtype)
