"""What the policy runs on: the functions of the families, with what decisions need to know about them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from detinfer import ops
from detinfer.ops import Covered
from detinfer.policy import proofs
from detinfer.policy.decide import Family, Known
from detinfer.policy.overloads import forms
from detinfer.policy.policy import Proof, Refused


@dataclass(frozen=True, eq=False)
class Families:
    """Covered operations with their functions, the IEEE operations, and how both are proved.

    ``level`` names the instruction set in use: a proof holds for that one only.
    """

    covered: Mapping[str, Covered]
    ieee: frozenset[str]
    prove: Callable[[str, torch.dtype], Proof | Refused]
    level: Callable[[], bytes]

    @functools.cached_property
    def known(self) -> Known:
        """The same without the functions: what ``decide`` is given."""
        covered: dict[str, Family] = {}
        ieee: dict[str, str] = {}
        for op, found in self.covered.items():
            for overload in forms(op):
                covered.setdefault(overload.name, Family(op, f"csrc/{found.family}", found.reduces))
        for op in sorted(self.ieee):
            for overload in forms(op):
                ieee.setdefault(overload.name, op)
        # An operation that is listed itself is proved itself.
        covered |= {op: Family(op, f"csrc/{found.family}", found.reduces) for op, found in self.covered.items()}
        ieee |= {op: op for op in self.ieee}
        return Known(MappingProxyType(covered), MappingProxyType(ieee), self.prove, draws)


@functools.cache
def own() -> Families:
    """detinfer's own families."""
    return Families(ops.covered(), ops.ieee_operations(), proofs.prove, proofs.level)


@functools.cache
def draws(op: str) -> bool:
    """Whether torch marks ``op`` as drawing random numbers."""
    name, _, overload = op.partition(".")
    found = torch._C._get_operation_overload(name, overload)
    return found is not None and torch.Tag.nondeterministic_seeded in found[2]


REDUCES: frozenset[str] = frozenset(op for op, found in ops.covered().items() if found.reduces)
"""The covered operations that contain a reduction, as the families list them."""
