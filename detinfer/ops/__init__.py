"""The families of operations, and what all of them cover on each kind of device: tables for the policy layer.

A family (``matmul``, ``attention``, ``elementwise``, ``rows``, ``moe``; on a GPU ``matmul_cuda``, ...) is a module here with

- ``COVERED``, the operations that it computes in their canonical order, each with its function;
- ``REDUCES``, those of them that contain a reduction (the others have no order to get wrong);
- ``prove(op, dtype)``, a bitwise comparison of an operation with its reference on this machine.

``elementwise`` also has ``IEEE``, the operations that torch's own kernels compute with one IEEE rounding per element,
and ``prove_ieee(op, dtype)``; on a GPU it has ``VALUES`` as well, torch's own exp and its kin, and ``prove_values``. Operations are spelled as torch names them: ``aten::silu``, ``aten::mean.dim``; an
overload called ``default`` is left out. Nothing here loads the native library: the first call does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

import torch

FAMILIES = ("matmul", "attention", "elementwise", "rows", "moe")

FAMILIES_ON: dict[str, tuple[str, ...]] = {
    "cpu": FAMILIES,
    "cuda": ("matmul_cuda", "attention_cuda", "elementwise_cuda", "rows_cuda", "moe_cuda"),
}
"""The families of each kind of device."""

_PORTABLE: dict[str, frozenset[torch.dtype]] = {
    "matmul_cuda": frozenset({torch.float32}),
    "attention_cuda": frozenset(),
}
"""The dtypes in which a family's bits are the same on every machine, for those families of which not all are: matrix
units of two GPUs may add in two orders."""

_IEEE_HOME = {"cpu": "elementwise", "cuda": "elementwise_cuda"}


@dataclass(frozen=True)
class Covered:
    """An operation that a family computes in its canonical order."""

    op: str
    family: str
    function: Callable[..., Any]
    reduces: bool
    portable: frozenset[torch.dtype] | None = None
    """The dtypes in which its bits are the same on every machine; None: in all of them."""
    elsewhere: str = ""
    """Where it runs if that is not csrc: the family's ``PATH``."""


def family(name: str) -> ModuleType:
    """The module of a family."""
    return import_module(f"{__name__}.{name}")


@functools.cache
def covered(device: str = "cpu") -> Mapping[str, Covered]:
    """Every covered operation on a kind of device by name, in the order of the families."""
    table: dict[str, Covered] = {}
    for name in FAMILIES_ON[device]:
        module = family(name)
        for op, function in module.COVERED.items():
            if op in table:
                raise RuntimeError(f"{op} is covered by {table[op].family} and by {name}: one of them has to go")
            elsewhere = getattr(module, "PATH", "")
            table[op] = Covered(op, name, function, op in module.REDUCES, _PORTABLE.get(name), elsewhere)
    return MappingProxyType(table)


@functools.cache
def ieee_operations(device: str = "cpu") -> frozenset[str]:
    """Operations that torch's own kernels compute with one IEEE rounding per element."""
    home = _IEEE_HOME[device]
    return frozenset(family(home).IEEE) if home in FAMILIES_ON[device] else frozenset()


@functools.cache
def unlike_cpu(device: str) -> frozenset[str]:
    """Those of ``ieee_operations`` whose bytes are not the ones of torch's CPU kernels."""
    home = _IEEE_HOME[device]
    return frozenset(family(home).UNLIKE_CPU) if device != "cpu" and home in FAMILIES_ON[device] else frozenset()


@functools.cache
def value_operations(device: str = "cpu") -> frozenset[str]:
    """Operations of torch's own whose bits follow from the operands' values, on this machine: none on CPU."""
    home = _IEEE_HOME[device]
    return frozenset(family(home).VALUES) if device != "cpu" and home in FAMILIES_ON[device] else frozenset()


def prove(op: str, dtype: torch.dtype, device: str = "cpu") -> tuple[int, bytes]:
    """Compare ``op`` with its reference on this machine: how many results were compared, and their bytes.

    Raises Diverged with the first mismatch, UnsupportedDtype for a dtype without a canonical order.
    """
    found = covered(device).get(op)
    name, proof = (found.family, "prove") if found is not None else (_IEEE_HOME[device], "prove_ieee")
    if found is None and op in value_operations(device):
        proof = "prove_values"
    cases, results = getattr(family(name), proof)(op, dtype)
    return cases, results
