"""What a verification found, as values: reporters format them, the command line turns them into an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from detinfer import errors

SCHEMA = 1
Verdict = Literal["same", "diverged", "stale", "vacuous", "not_run", "not_promised"]
"""``not_promised``: bits differ where the policy's scope allows it. A report, and no failure."""


@dataclass(frozen=True)
class Divergence:
    """One comparison whose bytes differ, down to the first element.

    ``row`` are the indices of the differing row in the output, ``element`` the index in that row; ``got`` and
    ``expected`` are the two values' bits in hex; ``ulp`` is their distance (None when one is NaN or the dtype has no
    ULP). ``command`` redoes just this comparison.
    ``rank`` says on which of several ranks it was made, ``axis`` along which axis other than the batch and how.
    """

    unit: str
    kind: str
    type: str
    phase: str
    step: int
    request: int
    path: str
    row: tuple[int, ...]
    element: int
    got: str
    expected: str
    ulp: int | None
    rows_differing: int
    rows_compared: int
    trial: int | None = None
    batch: int | None = None
    position: int | None = None
    note: str = ""
    command: str = ""
    rank: int | None = None
    axis: str = ""


@dataclass(frozen=True)
class Cause:
    """The first operation whose results differ although the request is the same.

    ``path`` is the module that calls it, ``alone`` and ``other`` the shapes of its operands on both sides, ``index`` the
    element of the request's part of the result. ``inputs_differing`` numbers operands that differ already (none, unless
    the two runs reach the operation by different ones, ``only_there``), ``inputs_unknown`` those of which it cannot be
    told what belongs to the request; ``repeats`` says whether the operation gives its bytes again when it is run again
    on either side. ``batch`` is the smallest number of rows that still shows it, ``requests`` those
    in them, ``kernels_*`` the GPU kernels of both sides with their grids. ``ranks`` are those of several on which its
    results differ, empty on one; the element is the first of them's. ``note`` says what else was found out: where it is there, ``operation``
    may be the type of the module ``path``, in which no operation could be watched.
    """

    operation: str
    path: str
    dtype: str
    alone: str
    other: str
    index: tuple[int, ...]
    got: str
    expected: str
    ulp: int | None
    elements: int
    elements_differing: int
    inputs_differing: list[int] = field(default_factory=list)
    inputs_unknown: list[int] = field(default_factory=list)
    only_there: list[str] = field(default_factory=list)
    repeats: bool = True
    batch: int | None = None
    requests: list[int] = field(default_factory=list)
    kernels_alone: list[str] = field(default_factory=list)
    kernels_other: list[str] = field(default_factory=list)
    note: str = ""
    ranks: list[int] = field(default_factory=list)


def named(ranks: Sequence[int]) -> str:
    """``rank 2``, ``ranks 0 and 1``, ``ranks 0, 1 and 2``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


@dataclass
class AxisResult:
    """One way in which a run may change (``axes.NAMES``), and how often and with what outcome it was changed.

    ``note`` says how far it was changed or, where it was ``not_run``, why; ``first`` is the first row that differs.
    """

    name: str
    what: str
    verdict: Verdict = "not_run"
    comparisons: int = 0
    rows_compared: int = 0
    rows_differing: int = 0
    note: str = ""
    first: Divergence | None = None


@dataclass
class Tally:
    """Counts of one unit: rows that could have been compared, were compared, and differed.

    ``ulps`` counts differing elements by their distance (``bits.ulp_histogram``), ``trials`` differing rows by the number
    of the trial.
    """

    name: str
    kind: str
    type: str
    rows_possible: int = 0
    rows_compared: int = 0
    rows_differing: int = 0
    batches: int = 0
    skipped: str | None = None
    ulps: dict[str, int] = field(default_factory=dict)
    trials: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sensitivity:
    """Whether a planted wrong order was seen for one operation at one recorded shape.

    ``seen`` is None when the operation has no reduction at this shape. ``invariant`` is False when the operation
    itself, with nothing planted, gave a row other bits in a batch than alone.
    """

    operation: str
    dtype: str
    shape: str
    seen: bool | None
    invariant: bool
    rows: int
    note: str = ""


@dataclass
class Invariance:
    """Rows against the same rows run alone, here and now."""

    verdict: Verdict = "not_run"
    trials: int = 0
    batches: int = 0
    mean_batch: float = 0.0
    rows_possible: int = 0
    rows_compared: int = 0
    rows_differing: int = 0
    units: list[Tally] = field(default_factory=list)
    first: Divergence | None = None
    divergences: list[Divergence] = field(default_factory=list)
    sensitivity: list[Sensitivity] = field(default_factory=list)
    order_free: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    axes: list[AxisResult] = field(default_factory=list)
    cause: Cause | None = None


@dataclass
class Comparison:
    """Rows run alone now against the file."""

    verdict: Verdict = "not_run"
    calls: int = 0
    rows_compared: int = 0
    rows_differing: int = 0
    stale: list[tuple[str, str, str]] = field(default_factory=list)
    first: Divergence | None = None
    reasons: list[str] = field(default_factory=list)
    cause: Cause | None = None


@dataclass
class Consistency:
    """Whether all ranks held the same bytes of every tensor that was reduced over them."""

    verdict: Verdict = "not_run"
    ranks: int = 1
    tensors: int = 0
    differing: int = 0
    first: str = ""


@dataclass
class Control:
    """The first half of the trials with the policy off: a report, never judged."""

    verdict: Verdict = "not_run"
    trials: int = 0
    trials_diverged: int = 0
    rows_compared: int = 0
    rows_differing: int = 0
    units: list[Tally] = field(default_factory=list)
    first: Divergence | None = None
    axes: list[AxisResult] = field(default_factory=list)
    cause: Cause | None = None


@dataclass
class Result:
    """Everything that ``detinfer verify`` found; ``sweep`` holds the options that a trial is planned from.

    ``environment`` is the machine's of this run (``environment.Environment``). ``unfinished`` is there where the run was
    interrupted: what ``resume`` goes on from.
    """

    path: str
    target: str
    dtype: str
    policy: dict[str, Any]
    seed: int
    invariance: Invariance
    golden: Comparison
    control: Control
    consistency: Consistency = field(default_factory=Consistency)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    schema: int = SCHEMA
    sweep: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    unfinished: dict[str, Any] | None = None
    system_fingerprint: dict[str, Any] | None = None
    """What decided bits in this run (``fingerprint.Fingerprint.to_json``), where a report was asked for."""

    def exit_code(self) -> int:
        """Diverged before stale before vacuous; the control is never judged."""
        verdicts: Sequence[Verdict] = (self.invariance.verdict, self.golden.verdict, self.consistency.verdict)
        if "diverged" in verdicts:
            return errors.EXIT_DIVERGED
        if "stale" in verdicts:
            return errors.EXIT_GOLDEN
        if "vacuous" in verdicts:
            return errors.EXIT_VACUOUS
        return errors.EXIT_SAME

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, among them ``schema``, ``invariance``, ``golden``, ``control`` and ``consistency``."""
        return asdict(self)
