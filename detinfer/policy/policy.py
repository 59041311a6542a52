"""The values of the policy layer: what is promised, what may run, and each decision with its reason.

Nothing here runs anything. ``decide`` makes decisions from these values, ``apply`` carries them out, and goldens
write them into their manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from detinfer.errors import UsageError

Scope = Literal["run", "batch", "tp"]
"""Same bits for the same request whatever the run; ... the batch around it; ... the tensor-parallel size."""

Place = Literal["here", "portable"]
"""... on machines with this environment; ... on every machine whose operations are marked portable."""

Reductions = Literal["merged", "separate"]
"""The sums over ranks of a mixture-of-experts layer: one for all that it adds, or one each."""

COMPOSED_NORMS = "a norm that a model composes from pow, mean and rsqrt: each operation in its own order"
"""Nothing is replaced: such a norm's bits are not those of rms_norm, and goldens say so."""


@dataclass(frozen=True)
class Guarantee:
    """What the bits may not depend on (``scope``) and where that holds (``place``)."""

    scope: Scope = "batch"
    place: Place = "here"

    def __post_init__(self) -> None:
        if self.scope not in ("run", "batch", "tp"):
            raise UsageError(f"scope {self.scope!r}: one of run, batch, tp")
        if self.place not in ("here", "portable"):
            raise UsageError(f"place {self.place!r}: one of here, portable")


@dataclass(frozen=True)
class Proof:
    """A bitwise comparison that was made in this process.

    ``subject`` is the operation and dtype proved, ``against`` the reference it was compared with, ``cases`` how many
    results were compared, ``digest`` the SHA-256 of their bytes (the same on every machine for portable operations).
    """

    subject: str
    against: str
    cases: int
    digest: str


@dataclass(frozen=True)
class Accepted:
    """``op`` may run on ``path``; ``reason`` says why.

    ``proof`` is None for operations that need none (they move bytes, or are exact on integers) and for those that
    the policy allows without one. ``portable`` says that the bits do not depend on the machine.
    """

    op: str
    path: str
    reason: str
    proof: Proof | None = None
    portable: bool = False

    def to_json(self) -> dict[str, Any]:
        """The decision as plain JSON values."""
        return {"accepted": True} | asdict(self)


@dataclass(frozen=True)
class Refused:
    """``op`` may not run on ``path``, and why; the reason ends with what to do."""

    op: str
    path: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The decision as plain JSON values."""
        return {"accepted": False} | asdict(self) | {"proof": None, "portable": False}


Decision = Accepted | Refused


@dataclass(frozen=True)
class Policy:
    """A named set of choices; frozen, so that a golden can hold exactly what it was recorded under.

    ``allow`` lists operations that may run on torch's own path without a proof, spelled as refusals print them:
    ``aten::cumsum``, ``aten::max.dim`` (an overload called ``default`` is left out). It is asked last: an operation
    that is covered and proved runs on its covered path even when it is listed.
    ``uncovered`` says what happens to an operation that is neither covered nor allowed: ``refuse`` it, which needs
    a tracing pass over every call, or ``trust`` that a tracing pass was made before.
    ``reductions`` says how a mixture-of-experts layer adds its parts over ranks: ``merged``, the experts' and the shared
    expert's in one sum, or ``separate``, each in its own. They round in other places, so that a golden belongs to one.
    ``groups`` (scope ``tp``) is the number of groups into which the inputs of a row-parallel layer are cut; None: the
    largest power of two up to 8 that divides them.
    """

    guarantee: Guarantee = field(default_factory=Guarantee)
    allow: tuple[str, ...] = ()
    uncovered: Literal["refuse", "trust"] = "refuse"
    reductions: Reductions = "merged"
    groups: int | None = None

    def __post_init__(self) -> None:
        if self.uncovered not in ("refuse", "trust"):
            raise UsageError(f"uncovered {self.uncovered!r}: one of refuse, trust")
        if self.reductions not in ("merged", "separate"):
            raise UsageError(f"reductions {self.reductions!r}: one of merged, separate")
        if self.groups is not None and (self.groups < 1 or self.guarantee.scope != "tp"):
            raise UsageError(f"groups {self.groups}: a number from 1 on, and scope tp: others have no groups")
        object.__setattr__(self, "allow", tuple(self.allow))
        for op in self.allow:
            if "::" not in op or op.endswith(".default"):
                raise UsageError(f"allow {op!r}: write an operation as aten::name or aten::name.overload")

    def to_json(self) -> dict[str, Any]:
        """The policy as plain JSON values; ``reductions`` is written where they are separate, ``groups`` where
        they are given."""
        return {
            **({} if self.reductions == "merged" else {"reductions": self.reductions}),
            **({} if self.groups is None else {"groups": self.groups}),
            "scope": self.guarantee.scope,
            "place": self.guarantee.place,
            "allow": list(self.allow),
            "uncovered": self.uncovered,
        }


def from_json(held: dict[str, Any]) -> Policy:
    """The policy that ``Policy.to_json`` gave."""
    guarantee = Guarantee(held["scope"], held["place"])
    reductions, groups = held.get("reductions", "merged"), held.get("groups")
    return Policy(guarantee, tuple(held["allow"]), held["uncovered"], reductions, groups)
