"""What a policy in force has decided and seen so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from detinfer.bits import dtype_name
from detinfer.policy.calls import Call
from detinfer.policy.collectives import BACKEND, COVERED
from detinfer.policy.decide import MOVES, Known
from detinfer.policy.policy import COMPOSED_NORMS, Accepted, Decision, Policy
from detinfer.policy.trace import Key, Trace


class Active:
    """What ``with deterministic(...) as active`` gives; it can be read inside the block and after it.

    Under ``uncovered="trust"`` nothing is traced, so that the tables stay empty.
    """

    composed_norms = COMPOSED_NORMS
    """What happens to a norm that a model composes from smaller operations: a statement for manifests."""

    def __init__(self, policy: Policy, known: Known, trace: Trace | None) -> None:
        self.policy = policy
        self._known = known
        self._trace = trace

    @property
    def decisions(self) -> Mapping[Key, Decision]:
        """Each (operation, dtypes) met so far and what was decided, in order of first use."""
        return MappingProxyType(self._trace.decisions if self._trace else {})

    @property
    def counts(self) -> Mapping[Key, int]:
        """How often each (operation, dtypes) was called."""
        return MappingProxyType(self._trace.counts if self._trace else {})

    @property
    def calls(self) -> Mapping[Call, int]:
        """Each call of a reducing operation, tensors reduced to shape, stride and dtype, and how often it was made."""
        return MappingProxyType(self._trace.calls if self._trace else {})

    def decisions_json(self) -> list[dict[str, Any]]:
        """The decisions as plain JSON values, in order of first use: ``op``, ``dtypes``, ``accepted``, ``path``, ..."""
        return [
            {"op": op, "dtypes": [dtype_name(d) for d in dtypes]} | decision.to_json()
            for (op, dtypes), decision in self.decisions.items()
        ]

    def reducing_calls(self) -> Iterator[tuple[str, torch.dtype, tuple[tuple[int, ...], ...]]]:
        """(operation, dtype of its first floating-point tensor, shapes of its tensors), each once."""
        seen: dict[tuple[str, torch.dtype, tuple[tuple[int, ...], ...]], None] = {}
        for call in self.calls:
            dtype = next((o.dtype for o in call.operands if o.dtype.is_floating_point), None)
            if dtype is not None:
                seen[call.op, dtype, tuple(o.shape for o in call.operands)] = None
        yield from seen

    def order_free(self) -> list[str]:
        """Operations met that compute floating point and contain no reduction: no order can change their bits."""
        found: dict[str, None] = {}
        for (op, dtypes), decision in self.decisions.items():
            known = self._known.elsewhere.get(op.partition(" on ")[2], self._known)
            family = known.covered.get(decision.op)
            if (
                isinstance(decision, Accepted)
                and decision.reason != MOVES
                and not (decision.op in COVERED and decision.path != BACKEND)
                and any(d.is_floating_point for d in dtypes)
                and not (family is not None and family.reduces)
            ):
                found[op] = None
        return list(found)
