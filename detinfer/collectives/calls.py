"""The arguments of a collective as csrc/communicator.h has them, and the sentence for ranks that do not agree."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from detinfer.bits import dtype_name
from detinfer.errors import UnsupportedDtype, UsageError

ReduceOp = Literal["sum", "avg", "max", "min"]
Order = Literal["rank_order", "rank_tree"]
Path = Literal["1stage", "2stage"]

COLLECTIVES = {"barrier": 0, "all_reduce": 1, "reduce_scatter": 2, "all_gather": 3, "all_reduce_rms_norm": 4}
OPS = {"sum": 0, "avg": 1, "max": 2, "min": 3}
ORDERS = {"rank_order": 0, "rank_tree": 1}
PATH_NUMBERS = {"1stage": 0, "2stage": 1}
MODES = {"R": 0, "U": 1}
WEIGHT_MODES = {"llama": 0, "fp32": 1, "gemma": 2}

PATHS: dict[str, tuple[Path, ...]] = {
    "all_reduce": ("1stage", "2stage"),
    "reduce_scatter": ("1stage",),
    "all_gather": ("1stage",),
    "all_reduce_rms_norm": ("1stage", "2stage"),
}
"""The paths of each collective. ``1stage``: every rank reads all ranks' elements. ``2stage``: each rank reduces its
share, then all gather the shares."""

_steered: list[Path] = []


@contextmanager
def steered(path: Path) -> Iterator[None]:
    """Inside the block sums between ranks of the CPU take ``path`` where their caller names none: for tests of paths."""
    _steered.append(path)
    try:
        yield
    finally:
        _steered.pop()


def steering() -> Path | None:
    """The path of the innermost ``steered``; None: the faster one for the size."""
    return _steered[-1] if _steered else None


REDUCED: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}
"""Codes of the dtypes that a sum, a maximum and a minimum have an order for."""

_OTHERS = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)} - set(REDUCED), key=str)
COPIED = {**REDUCED, **{dtype: 1000 + i for i, dtype in enumerate(_OTHERS)}}
"""Codes of all dtypes, for collectives that copy."""


class Call(ctypes.Structure):
    """CollectiveCall of csrc/communicator.h: what the ranks have to agree on."""

    _fields_ = (
        ("collective", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("item", ctypes.c_int32),
        ("op", ctypes.c_int32),
        ("order", ctypes.c_int32),
        ("path", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("weight_mode", ctypes.c_int32),
        ("weight_dtype", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("eps", ctypes.c_double),
    )


class Args(ctypes.Structure):
    """CollectiveArgs of csrc/communicator.h."""

    _fields_ = (
        ("call", Call),
        ("in_", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("residual_out", ctypes.c_void_p),
    )


def _name(numbers: dict[str, int], number: int) -> str:
    return next((name for name, value in numbers.items() if value == number), str(number))


def describe(call: Call) -> str:
    """A rank's call in words: ``all_reduce(sum, rank_order, 2stage) of 12 x float32``."""
    what = _name(COLLECTIVES, call.collective)
    if what == "barrier":
        return what
    dtype = next((dtype_name(d) for d, code in COPIED.items() if code == call.dtype), f"dtype {call.dtype}")
    how = []
    if what != "all_gather":
        how += [_name(OPS, call.op), _name(ORDERS, call.order), _name(PATH_NUMBERS, call.path)]
    if what in ("reduce_scatter", "all_gather"):
        how.append(f"dim {call.dim}")
    if what == "all_reduce_rms_norm":
        weight = next((dtype_name(d) for d, code in REDUCED.items() if code == call.weight_dtype), "none")
        how += [f"rows of {call.n}", f"eps {call.eps!r}", f"mode {_name(MODES, call.mode)}"]
        how += [f"weight mode {_name(WEIGHT_MODES, call.weight_mode)}", f"weight {weight}"]
    return f"{what}({', '.join(how)}) of {call.count} x {dtype}"


def reduction(where: str, dtype: torch.dtype, op: str, order: str, path: str | None) -> None:
    """Raise UsageError or UnsupportedDtype, naming ``where``, for what has no canonical order or no such path."""
    if dtype not in REDUCED:
        names = ", ".join(dtype_name(d) for d in REDUCED)
        raise UnsupportedDtype(f"{where}: {dtype_name(dtype)} has no canonical order over ranks; use {names}")
    if op not in OPS or order not in ORDERS:
        raise UsageError(f"{where}: op {op!r} is one of {', '.join(OPS)}, order {order!r} one of {', '.join(ORDERS)}")
    if op == "avg" and not dtype.is_floating_point:
        raise UsageError(f"{where}: an average of {dtype_name(dtype)} has no rounding of its own; use op='sum'")
    if path is not None and path not in PATHS[where]:
        raise UsageError(f"{where}: path {path!r} is one of {', '.join(PATHS[where])}")
