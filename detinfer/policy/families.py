"""What the policy runs on: the functions of the families on each kind of device, with what decisions need to know."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    """Covered operations of one kind of device with their functions, those of torch's own, and how all are proved.

    ``ieee`` round once per element, those in ``unlike_cpu`` other operands than torch's CPU kernels do; of ``values`` the
    bits follow from the operands' values, on one kind of machine.

    ``level`` names the instruction set in use (on a GPU: the GPU): a proof holds for that one only. ``elsewhere`` holds
    the families of other kinds of device, by torch's names for these (``cuda``).
    """

    covered: Mapping[str, Covered]
    ieee: frozenset[str]
    prove: Callable[[str, torch.dtype], Proof | Refused]
    level: Callable[[], bytes]
    values: frozenset[str] = frozenset()
    unlike_cpu: frozenset[str] = frozenset()
    device: str = "cpu"
    elsewhere: Mapping[str, Families] = field(default_factory=dict)

    @functools.cached_property
    def known(self) -> Known:
        """The same without the functions: what ``decide`` is given."""
        covered: dict[str, Family] = {}
        ieee: dict[str, str] = {}
        values: dict[str, str] = {}
        for op, found in self.covered.items():
            for overload in forms(op):
                covered.setdefault(overload.name, self._family(op, found))
        for table, operations in ((ieee, self.ieee), (values, self.values)):
            for op in sorted(operations):
                for overload in forms(op):
                    table.setdefault(overload.name, op)
        # An operation that is listed itself is proved itself.
        covered |= {op: self._family(op, found) for op, found in self.covered.items()}
        ieee |= {op: op for op in self.ieee}
        values |= {op: op for op in self.values}
        elsewhere = {device: families.known for device, families in self.elsewhere.items()}
        return Known(
            covered=MappingProxyType(covered),
            ieee=MappingProxyType(ieee),
            prove=self.prove,
            random=draws,
            values=MappingProxyType(values),
            unlike_cpu=self.unlike_cpu,
            device=self.device,
            elsewhere=MappingProxyType(elsewhere),
        )

    def _family(self, op: str, found: Covered) -> Family:
        where = found.elsewhere or proofs.path(found.family, self.device)
        return Family(op, where, found.reduces, found.portable)


@functools.cache
def own() -> Families:
    """detinfer's own families: of CPU, and of CUDA devices where torch was built for them."""
    elsewhere = {}
    if torch.version.cuda is not None:
        elsewhere["cuda"] = Families(
            covered=ops.covered("cuda"),
            ieee=ops.ieee_operations("cuda"),
            prove=functools.partial(proofs.prove, device="cuda"),
            level=proofs.gpu_level,
            values=ops.value_operations("cuda"),
            unlike_cpu=ops.unlike_cpu("cuda"),
            device="cuda",
        )
    return Families(ops.covered(), ops.ieee_operations(), proofs.prove, proofs.level, elsewhere=elsewhere)


@functools.cache
def draws(op: str) -> bool:
    """Whether torch marks ``op`` as drawing random numbers."""
    name, _, overload = op.partition(".")
    found = torch._C._get_operation_overload(name, overload)
    return found is not None and torch.Tag.nondeterministic_seeded in found[2]


REDUCES: frozenset[str] = frozenset(op for op, found in ops.covered().items() if found.reduces)
"""The covered operations that contain a reduction, as the families list them."""
