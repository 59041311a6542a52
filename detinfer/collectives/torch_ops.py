"""The collectives as operators of torch, ``torch.ops.detinfer.*``, so that torch.compile keeps them in its graphs.

A communicator's methods call them while a function is being compiled; a program seldom calls them itself. Each takes the
number under which ``register`` keeps the communicator. They have no autograd.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from detinfer.errors import UsageError

_known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)

_library: Any = torch.library.Library("detinfer", "DEF")  # type: ignore[no-untyped-call]
_SCHEMAS = (
    "all_reduce(Tensor x, int ranks, str op, str order, str path) -> Tensor",
    "reduce_scatter(Tensor x, int ranks, int dim, str op, str order, str path) -> Tensor",
    "all_gather(Tensor x, int ranks, int dim, str path) -> Tensor",
    (
        "all_reduce_rms_norm(Tensor x, Tensor residual, Tensor? weight, int ranks, float eps, str mode, "
        "str weight_mode, str order, str path) -> (Tensor, Tensor)"
    ),
)


def register(communicator: object) -> int:
    """Keep a communicator for the operators as long as somebody else keeps it; its number."""
    number = next(_numbers)
    _known[number] = communicator
    return number


def into(out: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    """``result``, or ``out`` with its values; UsageError where ``out`` is of another shape or dtype."""
    if out is None:
        return result
    if out.shape != result.shape or out.dtype != result.dtype:
        raise UsageError(
            f"out is {out.dtype} {list(out.shape)}, the result {result.dtype} {list(result.shape)}; they have to agree"
        )
    return out.copy_(result)


def _of(number: int) -> Any:
    found = _known.get(number)
    if found is None:
        raise UsageError(f"torch.ops.detinfer: there is no communicator {number} any more; connect again and recompile")
    return found


def _path(path: str) -> dict[str, str]:
    return {"path": path} if path else {}


def _all_reduce(x: torch.Tensor, ranks: int, op: str, order: str, path: str) -> torch.Tensor:
    found: torch.Tensor = _of(ranks).all_reduce(x, op=op, order=order, **_path(path))
    return found


def _reduce_scatter(x: torch.Tensor, ranks: int, dim: int, op: str, order: str, path: str) -> torch.Tensor:
    found: torch.Tensor = _of(ranks).reduce_scatter(x, dim=dim, op=op, order=order, **_path(path))
    return found


def _all_gather(x: torch.Tensor, ranks: int, dim: int, path: str) -> torch.Tensor:
    found: torch.Tensor = _of(ranks).all_gather(x, dim=dim, **_path(path))
    return found


def _all_reduce_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    ranks: int,
    eps: float,
    mode: str,
    weight_mode: str,
    order: str,
    path: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"mode": mode, "weight_mode": weight_mode, "order": order, **_path(path)}
    found: tuple[torch.Tensor, torch.Tensor] = _of(ranks).all_reduce_rms_norm(x, residual, weight, eps, **options)
    return found


# What a compiler has to know: shapes, dtypes and devices of the results, all contiguous.


def _like(x: torch.Tensor, ranks: int, op: str, order: str, path: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def _slice(x: torch.Tensor, ranks: int, dim: int, op: str, order: str, path: str) -> torch.Tensor:
    shape, size = list(x.shape), _of(ranks).size
    if shape[dim] % size:
        raise UsageError(f"reduce_scatter: dimension {dim} of size {shape[dim]} has no {size} equal slices")
    shape[dim] = shape[dim] // size
    return x.new_empty(shape)


def _whole(x: torch.Tensor, ranks: int, dim: int, path: str) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] * _of(ranks).size
    return x.new_empty(shape)


def _two(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, ranks: int, *options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _define() -> None:
    kernels: tuple[Any, ...] = (_all_reduce, _reduce_scatter, _all_gather, _all_reduce_rms_norm)
    fakes: tuple[Any, ...] = (_like, _slice, _whole, _two)
    for schema, kernel, fake in zip(_SCHEMAS, kernels, fakes, strict=True):
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"detinfer::{name}", fake, lib=_library)


_define()
