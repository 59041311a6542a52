"""What the values of arguments, not their dtypes, change about a decision."""

from __future__ import annotations

from typing import Any

import torch

from detinfer.policy.copies import named

SUMS = "accumulate"
SCALED = "alpha"
WHOLE_STEPS = "whole steps"

ARANGE = named("arange arange.start arange.start_step arange.out arange.start_out")
"""Operations that may have whole steps."""

# They take ``accumulate`` as their fourth argument, ``alpha`` as their third or by name.
_ACCUMULATING = named("index_put index_put_ _index_put_impl_ _unsafe_index_put index_put.out put put_")
_SCALING = named(
    "add.Scalar add.Tensor add_.Scalar add_.Tensor add.out add.Scalar_out sub.Scalar sub.Tensor sub_.Scalar sub_.Tensor "
    "sub.out sub.Scalar_out rsub.Scalar rsub.Tensor rsub.Scalar_out rsub.Tensor_out"
)

VARIES = ARANGE | _ACCUMULATING | _SCALING
"""The operations for which ``variant`` can be other than empty."""

_EXACT_UP_TO = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}


def variant(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What the arguments' values (not their dtypes) change about a decision; empty for almost every call.

    ``accumulate``: an ``index_put`` that adds. ``alpha``: a sum with a factor other than 1. ``whole steps``: an
    ``arange`` over integers that its dtype holds exactly, whose result is therefore the same however it is computed.
    """
    if op in _SCALING:
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        return SCALED if alpha != 1 else ""
    if op in _ACCUMULATING:
        adds = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
        return SUMS if adds else ""
    if op in ARANGE:
        out = kwargs.get("out")
        dtype = kwargs.get("dtype") or (out.dtype if out is not None else torch.get_default_dtype())
        limit = _EXACT_UP_TO.get(dtype, 0)
        numbers = [float(a) for a in args if isinstance(a, int | float)]
        return WHOLE_STEPS if all(n.is_integer() and abs(n) <= limit for n in numbers) else ""
    return ""
