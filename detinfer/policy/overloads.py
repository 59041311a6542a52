"""The in-place and ``out`` forms of an operation, found from torch's schemas.

A family writes one function for ``aten::silu``; ``aten::silu_`` and ``aten::silu.out`` compute the same and store it
elsewhere, so they are made from it here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Form = Literal["functional", "inplace", "out"]


@dataclass(frozen=True)
class Overload:
    """One form of an operation: ``outs`` names the keyword arguments that receive the results."""

    name: str
    form: Form
    outs: tuple[str, ...] = ()
    takes_dtype: bool = False


@functools.cache
def forms(op: str) -> tuple[Overload, ...]:
    """``op`` itself, then its in-place and ``out`` forms, as far as torch has them.

    An in-place form is called ``op_`` and takes the same arguments, the first one written to. An ``out`` form takes
    the same arguments and those that receive the results.
    """
    base, _, overload = op.partition(".")
    own = next((s for s in _schemas(base) if s.overload_name == overload), None)
    if own is None:
        raise LookupError(f"this torch has no operation {op}")
    wanted = _signature(own.arguments)
    dtype = any(a.name == "dtype" for a in own.arguments)
    found = [Overload(op, "functional", (), dtype)]
    found += [
        Overload(_name(s), "inplace", (), dtype)
        for s in _schemas(base + "_")
        if _signature(s.arguments) == wanted and s.arguments and s.arguments[0].is_write
    ]
    for s in _schemas(base):
        outs = tuple(a.name for a in s.arguments if a.is_write and a.kwarg_only)
        if outs and _signature([a for a in s.arguments if a.name not in outs]) == wanted:
            found.append(Overload(_name(s), "out", outs, dtype))
    return tuple(found)


def _schemas(base: str) -> list[Any]:
    schemas: list[Any] = torch._C._jit_get_schemas_for_operator(base)
    return schemas


def _name(schema: Any) -> str:
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def _signature(arguments: list[Any]) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in arguments]


def adapt(function: Callable[..., Any], overload: Overload) -> Callable[..., Any]:
    """``function`` (the functional form) called as ``overload``; returns NotImplemented when ``function`` does."""
    if overload.form == "functional":
        return function
    if overload.form == "inplace":

        def inplace(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = function(self, *args, **kwargs)
            if result is NotImplemented:
                return result
            return _store(overload.name, self, result)

        return inplace

    def out(*args: Any, **kwargs: Any) -> Any:
        targets = [kwargs.pop(name) for name in overload.outs]
        if overload.takes_dtype and kwargs.get("dtype") is None and not any(isinstance(a, torch.dtype) for a in args):
            kwargs["dtype"] = targets[0].dtype  # as torch does: a reduction is computed in the dtype it is stored in
        result = function(*args, **kwargs)
        if result is NotImplemented:
            return result
        results = result if isinstance(result, tuple) else (result,)
        for target, value in zip(targets, results, strict=True):
            if target.shape != value.shape:
                target.resize_(value.shape)
            _store(overload.name, target, value)
        return tuple(targets) if isinstance(result, tuple) else targets[0]

    return out


def _store(name: str, target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if not torch.can_cast(value.dtype, target.dtype):
        raise RuntimeError(f"{name}: result type {value.dtype} can't be cast to the desired output type {target.dtype}")
    return target.copy_(value)
