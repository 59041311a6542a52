"""Elementwise operations on CUDA: torch's own kernels, each after a proof on this machine.

Two kinds. ``IEEE``: one IEEE rounding per element, compared with the reference of ``ieee``, so their bytes are those of
every other machine. ``VALUES``: torch's exp, silu, gelu, pow and their kin, whose bytes are this GPU's and this torch's;
it is proved that they follow from the operands' values alone: not from the place in the tensor, alignment, strides, the
tensor's size, or what else it holds.

Refused, because the place decides or nobody has looked: whatever is in neither list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from detinfer import native
from detinfer.errors import Diverged, RefusedError
from detinfer.ops import ieee
from detinfer.ops.evidence import WIDTHS, every_exponent, from_bits, to_values
from detinfer.ops.rows_cuda_proof import same_bytes
from detinfer.reference import elementwise as reference

Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_UNARY = """
    silu gelu sigmoid tanh exp exp2 expm1 log log2 log10 log1p erf erfc sin cos rsqrt sqrt softplus
    tan asin acos atan sinh cosh asinh acosh atanh log_sigmoid_forward hardsigmoid hardswish elu celu mish
"""
_BINARY = """
    pow.Tensor_Tensor maximum minimum clamp.Tensor clamp_min.Tensor clamp_max.Tensor atan2 fmod.Tensor remainder.Tensor
    floor_divide div.Tensor_mode hypot logaddexp addcmul addcdiv lerp.Tensor copysign.Tensor
"""
_SCALARS: dict[str, tuple[Call, ...]] = {
    "pow.Tensor_Scalar": tuple((lambda x, _, y=y: torch.pow(x, y)) for y in (2, 3, 0.5, -1, 0.3)),  # type: ignore[misc]
    "pow.Scalar": tuple((lambda x, _, b=b: torch.pow(b, x)) for b in (10000.0, -2.0)),  # type: ignore[misc]
    "fmod.Scalar": (lambda x, _: torch.fmod(x, 0.3),),
    "remainder.Scalar": (lambda x, _: torch.remainder(x, 0.3),),
    "floor_divide.Scalar": (lambda x, _: torch.ops.aten.floor_divide.Scalar(x, 0.3),),
    "lerp.Scalar": (lambda x, y: torch.lerp(x, y, 0.3),),
}
_SPELLED: dict[str, tuple[Call, ...]] = {
    "gelu": (lambda x, _: torch.ops.aten.gelu(x), lambda x, _: torch.ops.aten.gelu(x, approximate="tanh")),
    "softplus": (lambda x, _: torch.ops.aten.softplus(x), lambda x, _: torch.ops.aten.softplus(x, 0.3, 1)),
    "clamp.Tensor": (lambda x, y: torch.clamp(x, y, y + 1), lambda x, y: torch.clamp(x, max=y)),
    "div.Tensor_mode": (
        lambda x, y: torch.div(x, y, rounding_mode="floor"),
        lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    ),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=0.3),),
    "addcdiv": (lambda x, y: torch.addcdiv(x, x, y, value=0.3),),
    "lerp.Tensor": (lambda x, y: torch.lerp(x, y, y),),
    "log_sigmoid_forward": (lambda x, _: torch.ops.aten.log_sigmoid_forward(x)[0],),
}

COVERED: dict[str, Callable[..., Any]] = {}
"""Nothing here replaces torch's own kernels."""

REDUCES: frozenset[str] = frozenset()

IEEE: tuple[str, ...] = tuple(op for op in ieee.IEEE if op not in ("aten::copysign.Tensor", "aten::copysign.Scalar"))
"""Operations that round once per element: ``prove_ieee`` proves them and ``MOVES``.

Their bytes are those of CPU but for ``ieee.UNLIKE_CPU``. copysign is none of them: the CUDA kernel for fp16 loses
the sign of a NaN.
"""

UNLIKE_CPU = ieee.UNLIKE_CPU
MOVES = ieee.MOVES

VALUES: tuple[str, ...] = tuple(f"aten::{name}" for name in (*_UNARY.split(), *_BINARY.split(), *_SCALARS))
"""Operations whose bytes follow from the operands' values on this machine: ``prove_values`` proves them."""


def prove_ieee(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """``ieee.prove_ieee`` of torch's kernel on the current CUDA device."""
    return ieee.prove_ieee(op, dtype, "cuda")


def prove_values(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare torch's result at many places, sizes, strides and alignments; (results compared, bytes of one of each).

    Every value of a 16-bit dtype, 65536 values spread over fp32. Raises Diverged where a byte depends on more than the
    values, or where the result is far from the function; RefusedError for an operation that is not in ``VALUES``.
    """
    native.dtype_code(dtype, op)
    if op not in VALUES:
        raise RefusedError(f"{op} is none of the operations whose result depends on the values alone")
    cases, results = 0, b""
    for call in calls(op):
        x, y = _operands(dtype)
        expected = call(x, y)
        same = [(where, same_bytes(got, wanted)) for where, got, wanted in _places(call, x, y, expected)]
        agreed = torch.stack([one for _, one in same]).cpu().tolist()
        if wrong := [where for (where, _), good in zip(same, agreed, strict=True) if not good]:
            raise Diverged(
                f"{op} on {dtype}: another result {', '.join(wrong)}: torch's kernel looks at more than the values; "
                "do not use it, and report it"
            )
        host = expected.cpu()
        _near(op, x.cpu(), host)
        cases += host.numel() * len(same)
        results += host.view(torch.uint8).numpy().tobytes()
    return cases, results


def calls(op: str) -> tuple[Call, ...]:
    """Each way in which ``op`` is proved, as a function of two tensors; the second is ignored by functions of one."""
    name, _, overload = op.removeprefix("aten::").partition(".")
    spelled = f"{name}.{overload}" if overload else name
    if found := _SCALARS.get(spelled) or _SPELLED.get(spelled):
        return found
    function = getattr(getattr(torch.ops.aten, name), overload or "default")
    if spelled in _BINARY.split():
        return (function,)
    return (partial(_first, function),)


def _first(function: Callable[..., torch.Tensor], x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return function(x)


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    every = np.arange(65536, dtype=np.uint16)
    x = every_exponent(dtype, 65536) if dtype is torch.float32 else from_bits(every, dtype)
    y = x[torch.from_numpy(np.random.default_rng(11).permutation(65536))].clone()
    y[:16] = torch.tensor([0.0, -0.0, 1.0, 2.0], dtype=dtype).repeat(4)
    return x.cuda(), y.cuda()


def _places(
    call: Call, x: torch.Tensor, y: torch.Tensor, expected: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(where, result there, what it has to be) for the same values elsewhere."""
    count = len(x)
    for offset in (1, 2, 3, 5):
        moved = [
            torch.empty(count + 8, dtype=v.dtype, device=v.device)[offset : offset + count].copy_(v) for v in (x, y)
        ]
        yield f"{offset} elements off an aligned address", call(moved[0], moved[1]), expected
        yield f"with one operand {offset} elements off", call(moved[0], y), expected
    for width in WIDTHS:
        start = 977 * width % (count - width)
        part = slice(start, start + width)
        yield f"in a tensor of {width}", call(x[part], y[part]), expected[part]
    yield "in a tensor of no dimensions", call(x[777], y[777]), expected[777]
    yield "at every other element", call(x[::2], y[::2]), expected[::2]
    yield "strided, the other operand not", call(x[::3], y[::3].contiguous()), expected[::3]
    yield "transposed", call(x.view(256, 256).t(), y.view(256, 256).t()), expected.view(256, 256).t()
    mixed = call(x.view(256, 256), y.view(256, 256).t().contiguous().t())
    yield "with operands of two layouts", mixed, expected.view(256, 256)
    turned = torch.from_numpy(np.random.default_rng(5).permutation(count)).to(x.device)
    yield "in another order", call(x[turned], y[turned]), expected[turned]
    large = call(x.repeat(41), y.repeat(41))
    yield "in a large tensor", large, expected.repeat(41)
    column, row = x.view(256, 256), y[:256]
    whole = call(column, row.expand(256, 256).contiguous())
    yield "broadcast along rows", call(column, row), whole
    yield "broadcast along columns", call(column.t(), row[:, None]), whole.t()
    yield "a second time", call(x, y), expected


def _near(op: str, x: torch.Tensor, got: torch.Tensor) -> None:
    """That it is the function at all: within 2^-19 of it, relative to the greatest of result, operand and 1."""
    truth = reference.UNARY.get(op.removeprefix("aten::"))
    if truth is None or op == "aten::gelu":  # calls() gives two functions for it
        return
    with np.errstate(all="ignore"):
        values, found = to_values(x).astype(np.float64), to_values(got).astype(np.float64)
        expected = reference.quiet(truth)(to_values(x)).astype(np.float64)
        allowed = 2.0**-19 * np.maximum(1, np.abs(values)) + 4 * torch.finfo(got.dtype).eps * np.abs(expected)
        wrong = np.abs(found - expected) > allowed
    wrong &= np.isfinite(found) & np.isfinite(expected)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise Diverged(f"{op} on {got.dtype}: {found[at]} for {values[at]}, it is {expected[at]}: report this kernel")
