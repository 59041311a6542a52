"""Elementwise functions on CPU: an element's bits depend on its value, not on where in the tensor it lies.

The functions are those of ``detinfer/reference/elementwise.py``, at most 2 ULP (of fp32) from the true value. Inputs
and results are fp32, bf16 or fp16; values are widened to fp32, computed, rounded once to fp32 and once to the dtype.
Integer tensors are converted to torch's default dtype first, as torch does, except by functions that torch defines for
floating point alone. float64 and complex raise UnsupportedDtype.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from detinfer import native
from detinfer.ops.evidence import WIDTHS, Evidence, every_exponent, from_values, to_values
from detinfer.ops.ieee import IEEE, prove_ieee
from detinfer.reference import elementwise as reference
from detinfer.reference.arithmetic import Float

__all__ = ["COVERED", "IEEE", "REDUCES", "add_scaled", "prove", "prove_ieee"]

Scalar = bool | int | float

# In the order of csrc/elementwise.h, whose numbers these are.
UNARY = (
    "silu",
    "gelu",
    "gelu_tanh",
    "sigmoid",
    "tanh",
    "exp",
    "exp2",
    "expm1",
    "log",
    "log2",
    "log10",
    "log1p",
    "erf",
    "erfc",
    "sin",
    "cos",
    "rsqrt",
    "sqrt",
)
OPS = {name: number for number, name in enumerate(UNARY)}
_SOFTPLUS, _POW, _ADD_SCALED, _MAXIMUM, _MINIMUM = range(32, 37)


_args = struct.Struct("@2iq3P2d")  # ElementwiseArgs of csrc/elementwise.h
_pack_args = _args.pack
_ARGS_SIZE = _args.size


def _call(
    op: int, out: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None, where: str, a: float = 0, b: float = 0
) -> torch.Tensor:
    code = native.dtype_code(out.dtype, where)
    x_pointer, y_pointer = 0 if x is None else x.data_ptr(), 0 if y is None else y.data_ptr()
    run = native.entry("elementwise", _ARGS_SIZE)
    if status := run(_pack_args(op, code, out.numel(), x_pointer, y_pointer, out.data_ptr(), a, b)):
        native.check(status)
    return out


def _unary(name: str, integers: bool) -> Callable[[torch.Tensor], Any]:
    op, where, codes = OPS[name], f"aten::{name}", native.DTYPES

    def function(self: torch.Tensor) -> Any:
        # A decode step of a small model makes hundreds of such calls, each between two products that have emptied the
        # caches: what is not touched here is time won.
        code = codes.get(self.dtype)
        if code is not None and self.is_contiguous():
            out = torch.empty_like(self)
            args = _pack_args(op, code, self.numel(), self.data_ptr(), 0, out.data_ptr(), 0.0, 0.0)
            if status := native.entry("elementwise", _ARGS_SIZE)(args):
                native.check(status)
            return out
        if code is None:
            if self.is_floating_point() or self.is_complex():
                native.dtype_code(self.dtype, where)  # raises
            if not integers:
                return NotImplemented
            self = self.to(torch.get_default_dtype())
        x = self.contiguous()
        return _call(op, torch.empty_like(x), x, None, where)

    function.__name__ = name
    function.__doc__ = f"aten::{name}: a tensor of any shape to one of the same shape and dtype."
    return function


silu = _unary("silu", integers=False)
sigmoid = _unary("sigmoid", integers=True)
tanh = _unary("tanh", integers=True)
exp = _unary("exp", integers=True)
exp2 = _unary("exp2", integers=True)
expm1 = _unary("expm1", integers=True)
log = _unary("log", integers=True)
log2 = _unary("log2", integers=True)
log10 = _unary("log10", integers=True)
log1p = _unary("log1p", integers=True)
erf = _unary("erf", integers=True)
erfc = _unary("erfc", integers=True)
sin = _unary("sin", integers=True)
cos = _unary("cos", integers=True)
rsqrt = _unary("rsqrt", integers=True)
sqrt = _unary("sqrt", integers=True)
_gelu = _unary("gelu", integers=False)
_gelu_tanh = _unary("gelu_tanh", integers=False)


def gelu(self: torch.Tensor, *, approximate: str = "none") -> Any:
    """aten::gelu: x Phi(x), or with ``approximate="tanh"`` its approximation by tanh."""
    if approximate not in ("none", "tanh"):
        raise RuntimeError("approximate argument must be either none or tanh.")  # torch's own sentence
    return _gelu(self) if approximate == "none" else _gelu_tanh(self)


def softplus(self: torch.Tensor, beta: Scalar = 1, threshold: Scalar = 20) -> Any:
    """aten::softplus: log(1 + e^(beta x)) / beta, or x where beta x > threshold; both scalars in fp32."""
    if not (self.is_floating_point() or self.is_complex()):
        return NotImplemented
    x = self.contiguous()
    return _call(_SOFTPLUS, torch.empty_like(x), x, None, "aten::softplus", float(beta), float(threshold))


def pow_tensor_scalar(self: torch.Tensor, exponent: Scalar) -> Any:
    """aten::pow.Tensor_Scalar: x^y with the special cases of C99; y is rounded to the result's dtype, as in torch."""
    if self.dtype in native.DTYPES and not isinstance(exponent, complex):  # a real scalar leaves the dtype as it is
        x = self if self.is_contiguous() else self.contiguous()
        return _call(_POW, torch.empty_like(x), x, None, "aten::pow", float(exponent))
    return _pow(self, exponent, torch.result_type(self, exponent))


def pow_scalar(self: Scalar, exponent: torch.Tensor) -> Any:
    """aten::pow.Scalar: x^y for a scalar x, rounded to the result's dtype."""
    return _pow(self, exponent, torch.result_type(self, exponent))


def pow_tensor_tensor(self: torch.Tensor, exponent: torch.Tensor) -> Any:
    """aten::pow.Tensor_Tensor: x^y, shapes broadcast."""
    return _pow(self, exponent, torch.result_type(self, exponent))


def _pow(base: torch.Tensor | Scalar, exponent: torch.Tensor | Scalar, dtype: torch.dtype) -> Any:
    where = "aten::pow"
    if not (dtype.is_floating_point or dtype.is_complex):
        return NotImplemented
    native.dtype_code(dtype, where)
    if not isinstance(exponent, torch.Tensor):
        assert isinstance(base, torch.Tensor)
        x = base.to(dtype).contiguous()
        return _call(_POW, torch.empty_like(x), x, None, where, float(exponent))
    if not isinstance(base, torch.Tensor):
        y = exponent.to(dtype).contiguous()
        return _call(_POW, torch.empty_like(y), None, y, where, float(base))
    return _binary(_POW, base, exponent, dtype, where)


def _binary(op: int, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype, where: str, a: float = 0) -> torch.Tensor:
    shape: torch.Size = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
    x, y = x.to(dtype).expand(shape).contiguous(), y.to(dtype).expand(shape).contiguous()
    return _call(op, torch.empty_like(x), x, y, where, a)


def _extreme(op: int, x: torch.Tensor, y: torch.Tensor, where: str) -> Any:
    dtype = torch.result_type(x, y)
    if not (dtype.is_floating_point or dtype.is_complex):
        return NotImplemented
    native.dtype_code(dtype, where)
    return _binary(op, x, y, dtype, where)


def maximum(self: torch.Tensor, other: torch.Tensor) -> Any:
    """aten::maximum: NaN wins, and +0 is greater than -0 (torch's answer depends on where in the tensor they lie)."""
    return _extreme(_MAXIMUM, self, other, "aten::maximum")


def minimum(self: torch.Tensor, other: torch.Tensor) -> Any:
    """aten::minimum: NaN wins, and -0 is less than +0."""
    return _extreme(_MINIMUM, self, other, "aten::minimum")


def clamp_tensor(
    self: torch.Tensor,
    min: torch.Tensor | None = None,
    max: torch.Tensor | None = None,
) -> Any:
    """aten::clamp.Tensor: minimum(maximum(x, min), max)."""
    result: Any = self
    if min is not None:
        result = maximum(result, min)
    if max is not None and result is not NotImplemented:
        result = minimum(result, max)
    return result.clone() if result is self else result


def add_scaled(self: torch.Tensor, other: torch.Tensor | Scalar, alpha: Scalar) -> torch.Tensor:
    """``self + alpha * other`` as two roundings in fp32, product then sum, and one to the dtype; shapes broadcast.

    torch fuses both into one rounding on some machines and not on others, so torch's own ``add`` and ``sub`` are
    proved for ``alpha`` 1 alone. Subtraction is ``-alpha``.
    """
    where = "add_scaled"
    dtype = torch.result_type(self, other)
    native.dtype_code(dtype, where)
    if not isinstance(other, torch.Tensor):
        x = self.to(dtype).contiguous()
        return _call(_ADD_SCALED, torch.empty_like(x), x, None, where, float(alpha), float(other))
    return _binary(_ADD_SCALED, self, other, dtype, where, float(alpha))


COVERED: dict[str, Callable[..., Any]] = {
    "aten::silu": silu,
    "aten::gelu": gelu,
    "aten::sigmoid": sigmoid,
    "aten::tanh": tanh,
    "aten::exp": exp,
    "aten::exp2": exp2,
    "aten::expm1": expm1,
    "aten::log": log,
    "aten::log2": log2,
    "aten::log10": log10,
    "aten::log1p": log1p,
    "aten::erf": erf,
    "aten::erfc": erfc,
    "aten::softplus": softplus,
    "aten::sin": sin,
    "aten::cos": cos,
    "aten::rsqrt": rsqrt,
    "aten::sqrt": sqrt,
    "aten::pow.Tensor_Scalar": pow_tensor_scalar,
    "aten::pow.Scalar": pow_scalar,
    "aten::pow.Tensor_Tensor": pow_tensor_tensor,
    "aten::maximum": maximum,
    "aten::minimum": minimum,
    "aten::clamp.Tensor": clamp_tensor,
    "aten::clamp_min.Tensor": maximum,
    "aten::clamp_max.Tensor": minimum,
}
"""Operations that this family computes, each with its function."""

REDUCES: frozenset[str] = frozenset()
"""None of them contains a reduction."""


_BINARY: dict[str, Callable[..., Any]] = {
    "aten::pow.Tensor_Tensor": reference.power_of,
    "aten::maximum": reference.maximum,
    "aten::minimum": reference.minimum,
    "aten::clamp.Tensor": reference.maximum,
    "aten::clamp_min.Tensor": reference.maximum,
    "aten::clamp_max.Tensor": reference.minimum,
}


Call = Callable[[torch.Tensor], torch.Tensor]
Truth = Callable[[Float], Float]


def _cases(op: str, dtype: torch.dtype, x: torch.Tensor) -> list[tuple[Call, Truth]]:
    """Each way of calling the operation on a tensor, and the truth from its values."""
    if op == "aten::gelu":
        return [(_gelu, reference.UNARY["gelu"]), (_gelu_tanh, reference.UNARY["gelu_tanh"])]
    if op == "aten::softplus":
        return [(partial(softplus, beta=b), partial(reference.softplus, beta=b)) for b in (1, 0.3)]
    if op == "aten::pow.Tensor_Scalar":
        exponents = [(y, _rounded(y, dtype)) for y in (2.0, 3.0, 0.3)]
        return [(partial(pow_tensor_scalar, exponent=y), partial(reference.power_of, y=r)) for y, r in exponents]
    if op == "aten::pow.Scalar":
        bases = [(b, _rounded(b, dtype)) for b in (10000.0, -2.0)]
        return [(partial(pow_scalar, b), partial(reference.power_of, r)) for b, r in bases]
    if op in _BINARY:
        y = x.flip(0).clone()
        y[::3] = 2.0
        y[1:16] = torch.tensor([0.0, -0.0, 3.0], dtype=dtype).repeat(5)
        values, two = to_values(y), _BINARY[op]
        return [(lambda v: COVERED[op](v, y[: len(v)]), lambda v: two(v, values[: len(v)]))]
    return [(COVERED[op], reference.UNARY[op.removeprefix("aten::")])]


def _rounded(value: float, dtype: torch.dtype) -> Any:
    return to_values(from_values([value], dtype))[0]


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare the native path of ``op`` with the reference: alone, in rows of odd widths, and in one large tensor.

    Returns how many results were compared and their bytes; raises Diverged with the first mismatch.
    """
    native.dtype_code(dtype, op)
    evidence = Evidence(op, dtype)
    x = every_exponent(dtype)
    for call, truth in _cases(op, dtype, x):
        expected = from_values(reference.quiet(truth)(to_values(x)), dtype)
        evidence.expect(call(x), expected, "all of them")
        for width in WIDTHS:
            evidence.expect(call(x[:width]), expected[:width], f"width {width}")
        if op not in _BINARY:
            evidence.expect(call(x.repeat(6))[-len(x) :], expected, "a large tensor")
    return evidence.total()
