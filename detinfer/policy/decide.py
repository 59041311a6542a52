"""Whether an operation may run under a policy: a pure function from what is known to a decision with its reason.

The questions come in this order, and the first that says yes decides:

0. Is it a collective of torch.distributed? Its path between the ranks of its group, once that is proved
   (``collectives.decide_collective``).
1. Does a family cover it? Its path, once the family's proof has been made for each floating-point dtype.
2. Does it draw random numbers? Refused.
3. Are all its dtypes integers or booleans, and is it torch's own? Exact in any order: torch's own path.
4. Does it only move bytes? torch's own path; a cast on the way needs the proof of casts.
5. Is it one IEEE rounding per element? torch's own path, once that is proved.
6. On a GPU: do its bits follow from the operands' values alone? torch's own path, once that is proved.
7. Does the policy allow it by name? torch's own path, without a proof.

Anything else is refused: an operation that nobody has looked at never runs on a guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from detinfer.policy import refusals
from detinfer.policy.collectives import COVERED, Ranks, decide_collective
from detinfer.policy.collectives import MOVES as BETWEEN_RANKS
from detinfer.policy.copies import CAST, COPIES, casts
from detinfer.policy.policy import Accepted, Decision, Policy, Proof, Refused
from detinfer.policy.variants import ARANGE, SCALED, SUMS, WHOLE_STEPS

ADDED = ("sum", "avg")
"""Reductions over ranks whose order shows."""

TORCH = "torch"
"""The path of torch's own kernels on CPU; elsewhere the kind of device follows: ``torch/cuda``."""

MOVES = "moves bytes and computes nothing"
"""The reason for copies."""


_TORCH_OWN = ("aten", "prim", "prims", "profiler")
"""Namespaces of torch's own operations; what any other computes from integers is its author's affair."""

_QUANTISED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})
"""Integers that stand for fractions: their arithmetic rounds."""


@dataclass(frozen=True)
class Family:
    """A covered operation as a decision sees it: ``op`` is the one that is proved, ``path`` where it runs.

    ``portable`` are the dtypes in which its bits are the same on every machine; None: in all of them.
    """

    op: str
    path: str
    reduces: bool
    portable: frozenset[torch.dtype] | None = None


@dataclass(frozen=True)
class Known:
    """What decisions about operations on one kind of device are made from.

    ``covered`` holds every covered operation, in-place and ``out`` forms included (they name the operation whose
    proof stands for them); ``ieee`` the operations whose torch kernels round once per element, ``values`` those whose
    bits follow from the operands' values on one kind of machine; ``prove`` gives the
    proof of an operation for a dtype, or the reason why there is none; ``random`` says which operations draw random
    numbers. ``unlike_cpu`` are those of ``ieee`` that round other operands than torch's CPU kernels do. ``elsewhere``
    holds the same for other kinds of device.
    """

    covered: Mapping[str, Family]
    ieee: Mapping[str, str]
    prove: Callable[[str, torch.dtype], Proof | Refused]
    random: Callable[[str], bool]
    values: Mapping[str, str] = field(default_factory=dict)
    unlike_cpu: frozenset[str] = frozenset()
    device: str = "cpu"
    elsewhere: Mapping[str, Known] = field(default_factory=dict)

    @property
    def torch_path(self) -> str:
        """The path of torch's own kernels on this kind of device."""
        return TORCH if self.device == "cpu" else f"{TORCH}/{self.device}"


def decide(
    policy: Policy,
    op: str,
    dtypes: tuple[torch.dtype, ...],
    known: Known,
    *,
    variant: str = "",
    ranks: Ranks | None = None,
) -> Decision:
    """The decision for ``op`` on arguments of ``dtypes`` (with the dtype that the result was asked for, if any).

    ``variant`` is ``variants.variant`` of the arguments; for a collective its reduction, and ``ranks`` its group.
    Calls nothing but ``known`` and the proof of ``ranks``; raises nothing that they do not.
    """
    if op in COVERED:
        decision: Decision = (
            Refused(op, TORCH, "a collective is decided for a group: give its ranks")
            if ranks is None
            else Refused(op, ranks.path, refusals.OTHER_TREE)
            if policy.guarantee.scope == "tp" and variant in ADDED and dtypes[0].is_floating_point
            else decide_collective(op, variant, dtypes[0], ranks)
        )
    else:
        decision = _decide(op, dtypes, known, variant)
    if isinstance(decision, Refused) and op in policy.allow:
        decision = Accepted(op, known.torch_path, f"allowed by the policy; otherwise: {decision.reason}")
    if isinstance(decision, Accepted) and policy.guarantee.place == "portable" and not decision.portable:
        decision = Refused(op, decision.path, "its bits are not portable: use place 'here', or leave the operation out")
    return decision


def _decide(op: str, dtypes: tuple[torch.dtype, ...], known: Known, variant: str) -> Decision:
    if op in BETWEEN_RANKS:
        return Accepted(op, known.torch_path, MOVES, portable=True)
    floating = tuple(d for d in dtypes if d.is_floating_point or d.is_complex)
    family = known.covered.get(op)
    if family is not None and floating:
        return _proved(op, family.op, family.path, "canonical order", floating, known, family.portable)
    if known.random(op):
        return Refused(op, known.torch_path, refusals.random(op))
    if quantised := [d for d in dtypes if d in _QUANTISED]:
        return Refused(op, known.torch_path, refusals.dtype(quantised, known.device))
    if not floating and op.partition("::")[0] in _TORCH_OWN:
        return Accepted(op, known.torch_path, "integers and booleans: exact in any order", portable=True)
    if op in COPIES and variant != SUMS:
        if not casts(op, dtypes):
            return Accepted(op, known.torch_path, MOVES, portable=True)
        return _proved(op, CAST, known.torch_path, "a cast, one rounding per element", floating, known)
    if op in ARANGE and variant == WHOLE_STEPS:
        return Accepted(op, known.torch_path, "whole numbers that its dtype holds exactly", portable=True)
    if op in known.ieee and variant == SCALED:
        return Refused(op, known.torch_path, refusals.SCALED)
    if op in known.ieee:
        subject = known.ieee[op]
        portable = frozenset[torch.dtype]() if subject in known.unlike_cpu else None
        return _proved(op, subject, known.torch_path, "one IEEE rounding per element", floating, known, portable)
    if op in known.values:
        why = "the same values give the same bits wherever they stand"
        return _proved(op, known.values[op], known.torch_path, why, floating, known, frozenset())
    return Refused(op, known.torch_path, refusals.reason(op))


def _proved(
    op: str,
    subject: str,
    path: str,
    why: str,
    floating: tuple[torch.dtype, ...],
    known: Known,
    portable: frozenset[torch.dtype] | None = None,
) -> Accepted | Refused:
    if unsupported := [d for d in floating if d not in refusals.DTYPES]:
        return Refused(op, path, refusals.dtype(unsupported, known.device))
    proofs: list[Proof] = []
    for dtype in floating:
        proof = known.prove(subject, dtype)
        if isinstance(proof, Refused):
            return Refused(op, path, proof.reason)
        proofs.append(proof)
    everywhere = portable is None or portable.issuperset(floating)
    return Accepted(op, path, why, _joined(proofs), portable=everywhere)


def _joined(proofs: list[Proof]) -> Proof:
    if len(proofs) == 1:
        return proofs[0]
    return Proof(
        subject=", ".join(p.subject for p in proofs),
        against=proofs[0].against,
        cases=sum(p.cases for p in proofs),
        digest=hashlib.sha256("".join(p.digest for p in proofs).encode()).hexdigest(),
    )
