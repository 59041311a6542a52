"""Operations that torch's own CPU kernels compute with one IEEE rounding per element, or exactly; the proof of each.

Such an operation has no order to fix and no second way to round: a vector body and a scalar tail agree. That is proved
here, on this machine, against numpy's fp32 arithmetic followed by one rounding to the storage dtype: at odd widths,
contiguous, strided and broadcast, with subnormals, signed zeros and infinities among the operands.

Two limits. The payload and sign of a NaN are not part of the claim: x86 takes them from one of the operands. And
``add``, ``sub`` and ``rsub`` are proved for ``alpha`` 1 alone: torch multiplies by another ``alpha`` with or without a
rounding of its own, depending on the dtype and on where in the tensor the element lies (``elementwise.add_scaled`` has
one order).

Not here, because torch's answer depends on where an element lies: ``maximum``, ``minimum``, ``clamp`` with tensors and
``amax``, ``amin``, ``max``, ``min`` of signed zeros (the families cover them), ``floor_divide``, ``fmod``,
``remainder`` (nobody does). Nor ``sqrt``: torch's fp32 square root is not always the correctly rounded one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from detinfer import native
from detinfer.errors import RefusedError
from detinfer.ops.evidence import REFERENCE_NAME, WIDTHS, Evidence, every_exponent, from_bits, from_values, to_bits
from detinfer.ops.evidence import to_values as values_of
from detinfer.reference import elementwise
from detinfer.reference import ieee as reference
from detinfer.reference.arithmetic import CANONICAL_NAN

_UNARY = tuple(f"aten::{name}" for name in reference.UNARY)
_BINARY = tuple(f"aten::{name}" if name.startswith("logical") else f"aten::{name}.Tensor" for name in reference.BINARY)
_WITH_SCALAR = tuple(f"aten::{name}.Scalar" for name in reference.BINARY if not name.startswith("logical"))
_CHOICES = (
    "aten::clamp",
    "aten::clamp_min",
    "aten::clamp_max",
    "aten::hardtanh",
    "aten::leaky_relu",
    "aten::threshold",
    "aten::nan_to_num",
)
_FIRST = ("aten::argmax", "aten::argmin", "aten::max.dim", "aten::min.dim")
_CAST = "aten::_to_copy"

IEEE: tuple[str, ...] = (*_UNARY, *_BINARY, *_WITH_SCALAR, *_CHOICES, *_FIRST)
"""Names of operations, as torch spells them; their in-place and ``out`` forms run the same kernels."""

MOVES: tuple[str, ...] = ("aten::where.self", "aten::masked_fill.Scalar", "aten::masked_fill.Tensor", _CAST)
"""Operations that copy elements, and may convert them on the way; ``prove_ieee`` proves them too."""

SCALARS = (0.1, -3.0, 0.0)
"""Scalar operands of the proofs; the first has no exact value in any of the dtypes."""

_OVER_SCALARS = ("aten::add.Tensor", "aten::sub.Tensor", "aten::mul.Tensor", "aten::div.Tensor")
"""``x * 0.1`` is a call of ``mul.Tensor``: torch makes a tensor of the number."""

_KEEPS_SCALAR = {"cpu": ("mul", "div"), "cuda": ("mul", "add", "sub", "rsub")}
"""Here torch keeps a scalar operand in fp32; elsewhere it rounds the scalar to the tensor's dtype first."""

UNLIKE_CPU: tuple[str, ...] = (
    *("aten::relu", "aten::clamp", "aten::clamp_min", "aten::clamp_max", "aten::hardtanh"),
    *("aten::add.Tensor", "aten::sub.Tensor", "aten::div.Tensor"),
    *("aten::add.Scalar", "aten::sub.Scalar", "aten::rsub.Scalar", "aten::div.Scalar"),
)
"""Operations of which torch's CUDA kernels give other bytes than its CPU kernels, each of them one rounding.

Bounds that equal a zero of the other sign win on CUDA (relu of -0 is +0). A number as an operand of ``add`` and ``sub``
stays fp32 there, and ``x / number`` is a product with the fp32 reciprocal.
"""

_BOUNDS: dict[str, tuple[Callable[[Any, Any], Any], ...]] = {
    "cpu": (reference.clamp_min, reference.clamp_max),
    "cuda": (elementwise.maximum, elementwise.minimum),
}

Arguments = Callable[[torch.Tensor, torch.Tensor], tuple[Any, ...]]
Truth = Callable[[Any, Any], Any]
Case = tuple[Arguments, Truth]


def prove_ieee(op: str, dtype: torch.dtype, device: str = "cpu") -> tuple[int, bytes]:
    """Compare torch's own result on ``device`` with IEEE arithmetic; (results compared, their bytes).

    Raises Diverged with the first mismatch, RefusedError for an operation that is neither in ``IEEE`` nor in ``MOVES``.
    """
    native.dtype_code(dtype, op)
    if op not in IEEE and op not in MOVES:
        raise RefusedError(f"{op} is not an operation that rounds once per element: {', '.join(IEEE)}")
    evidence = Evidence(op, dtype)
    name, _, overload = op.removeprefix("aten::").partition(".")
    call = getattr(getattr(torch.ops.aten, name), overload or "default")
    with np.errstate(all="ignore"):
        if op in _FIRST:
            _prove_first(call, name, overload, dtype, evidence, device)
        elif op == _CAST:
            _prove_cast(call, dtype, evidence, device)
        else:
            for arguments, truth in _cases(op, name, overload, dtype, device):
                _prove_elements(call, arguments, truth, dtype, evidence, device)
    return evidence.total()


def _cases(op: str, name: str, overload: str, dtype: torch.dtype, device: str) -> list[Case]:
    """Each way of calling the operation: its arguments made from two tensors, and the truth from their values."""
    at_least, at_most = _BOUNDS[device]
    if op == "aten::relu" and device == "cuda":
        return [(lambda x, y: (x,), lambda x, y: at_least(x, reference.ZERO))]
    if op in _UNARY:
        return [(lambda x, y: (x,), lambda x, y: reference.UNARY[name](x))]
    tensors: list[Case] = [(lambda x, y: (x, y), reference.BINARY[name])] if op in _BINARY else []
    if op in _BINARY or op in _WITH_SCALAR:
        over = SCALARS if op in _WITH_SCALAR or op in _OVER_SCALARS else ()
        return tensors + [_with_scalar(name, scalar, dtype, device) for scalar in over]
    low, high, tenth = _rounded(-0.1, dtype), _rounded(0.3, dtype), np.float32(0.1)

    def between(x: Any, y: Any) -> Any:
        return at_most(at_least(x, low), high)

    def finite(x: Any, y: Any) -> Any:
        return np.where(np.isnan(x), high, np.where(np.isinf(x), np.copysign(np.float32(2), x), x))

    number = 0.3 if overload == "Scalar" else torch.tensor(0.3)
    table: dict[str, list[Case]] = {
        "clamp": [
            (lambda x, y: (x, -0.1, 0.3), between),
            (lambda x, y: (x, 0.0), lambda x, y: at_least(x, reference.ZERO)),
        ],
        "clamp_min": [(lambda x, y: (x, -0.1), lambda x, y: at_least(x, low))],
        "clamp_max": [(lambda x, y: (x, 0.3), lambda x, y: at_most(x, high))],
        "hardtanh": [(lambda x, y: (x, -0.1, 0.3), between)],
        "leaky_relu": [(lambda x, y: (x, 0.1), lambda x, y: np.where(x > 0, x, x * tenth))],
        "threshold": [(lambda x, y: (x, 0.3, -0.1), lambda x, y: np.where(x <= high, low, x))],
        "where": [(lambda x, y: (x > 0, x, y), lambda x, y: np.where(x > 0, x, y))],
        "masked_fill": [(lambda x, y: (x, y > 0, number), lambda x, y: np.where(y > 0, high, x))],
        "nan_to_num": [(lambda x, y: (x, 0.3, 2.0, -2.0), finite)],
    }
    return table[name]


def _with_scalar(name: str, scalar: float, dtype: torch.dtype, device: str) -> Case:
    if device == "cuda" and name == "div":
        inverse = np.float32(1) / np.float32(scalar)
        return lambda x, y: (x, scalar), lambda x, y: x * inverse
    kept = np.float32(scalar) if name in _KEEPS_SCALAR[device] else _rounded(scalar, dtype)
    return lambda x, y: (x, scalar), lambda x, y: reference.BINARY[name](x, kept)


def _rounded(value: float, dtype: torch.dtype) -> Any:
    return values_of(from_values([value], dtype))[0]


def _prove_elements(
    call: Callable[..., torch.Tensor],
    arguments: Arguments,
    truth: Truth,
    dtype: torch.dtype,
    evidence: Evidence,
    device: str,
) -> None:
    x, y = _operands(dtype)
    values = values_of(x), values_of(y)
    x, y = x.to(device), y.to(device)

    def check(a: torch.Tensor, b: torch.Tensor, expected: torch.Tensor, where: str) -> None:
        evidence.expect(_one_nan(call(*arguments(a, b))), _packed(expected), where)

    expected = _stored(truth(*values), dtype)
    check(x, y, expected, "all of them")
    for width in WIDTHS:
        check(x[-width:], y[-width:], expected[-width:], f"width {width}")
        check(x[:width:2], y[:width:2], expected[:width:2], f"strided, width {width}")
    rows, columns = x[:2940].reshape(60, 49), y[:49]
    expected = _stored(truth(values[0][:2940].reshape(60, 49), values[1][:49]), dtype)
    check(rows, columns, expected, "60 x 49, a row broadcast")
    check(rows.t(), columns[:, None], expected.t(), "49 x 60, transposed, a column broadcast")


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    # The first 16 pairs join every sign of zero and the least subnormals, the next 16 are equal.
    x = every_exponent(dtype)
    y = x[torch.from_numpy(np.random.default_rng(7).permutation(len(x)))].contiguous()
    first = torch.tensor([0.0, -0.0, 2.0**-149 if dtype is torch.float32 else 2.0**-24, 1.0], dtype=dtype)
    y[:16], y[16:32] = first.repeat_interleave(4), x[16:32]
    return torch.cat([first.repeat(4), x[16:]]), y


def _packed(x: torch.Tensor) -> torch.Tensor:
    # contiguous() would leave a strided slice of one element as it is.
    return x.clone(memory_format=torch.contiguous_format)


def _stored(truth: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(truth) if truth.dtype == bool else from_values(truth, dtype)


def _one_nan(result: torch.Tensor) -> torch.Tensor:
    """The result on CPU with every NaN made the canonical one: payloads are not part of the claim."""
    result = _packed(result).cpu()
    if not result.is_floating_point():
        return result
    bits = to_bits(result)
    nan = bits.dtype.type(CANONICAL_NAN[REFERENCE_NAME[result.dtype]])
    return from_bits(np.where(np.isnan(values_of(result)), nan, bits), result.dtype)


def _prove_first(
    call: Callable[..., Any], name: str, overload: str, dtype: torch.dtype, evidence: Evidence, device: str
) -> None:
    # Ties, zeros of both signs and NaN: the first one wins, whichever dimension is searched and however it is cut.
    truth = reference.first_greatest if "max" in name else reference.first_least
    for n in WIDTHS:
        random = np.random.default_rng(n)
        few = random.integers(-2, 3, (4, n)).astype(np.float32)
        zeros = np.where(random.integers(0, 2, (4, n)) == 0, np.float32(-0.0), reference.ZERO)
        holes = np.where(random.integers(0, 5, (4, n)) == 0, np.float32(np.nan), few)
        for values in (few, zeros, holes):
            x = from_values(values, dtype).to(device)
            index = truth(values)
            for tensor, dim in ((x, 1), (x.t().contiguous(), 0)):
                got = call(tensor, dim)
                where = f"{list(tensor.shape)}, dimension {dim}"
                if overload == "dim":
                    picked = from_values(values[np.arange(4), index], dtype)
                    evidence.expect(_one_nan(got[0]), picked, f"{where}, values")
                    got = got[1]
                evidence.expect(got.cpu(), torch.from_numpy(index), f"{where}, index")


def _prove_cast(call: Callable[..., torch.Tensor], dtype: torch.dtype, evidence: Evidence, device: str) -> None:
    for other in REFERENCE_NAME:
        for source, target in ((dtype, other), (other, dtype)):
            x = every_exponent(source)
            cast = partial(call, dtype=target)
            expected = from_values(values_of(x), target)
            x = x.to(device)
            for width in WIDTHS:
                where = f"{source} to {target}, width {width}"
                evidence.expect(_one_nan(cast(x[-width:])), expected[-width:], where)
                evidence.expect(_one_nan(cast(x[:width:2])), _packed(expected[:width:2]), f"{where}, strided")
    whole = np.arange(-1000, 1890, dtype=np.int64) * 40503  # beyond fp32's exact integers
    expected = from_values(whole.astype(np.float32), dtype)
    evidence.expect(call(torch.from_numpy(whole).to(device), dtype=dtype).cpu(), expected, "from int64")
    got = call(torch.from_numpy(whole > 0).to(device), dtype=dtype)
    evidence.expect(got.cpu(), from_values(whole > 0, dtype), "from bool")
