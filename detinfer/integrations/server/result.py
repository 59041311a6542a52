"""What ``detinfer verify URL`` found, as values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from detinfer import errors

SCHEMA = 1
KEPT = 50
"""Divergences kept with all details; the counts have the rest."""
Verdict = Literal["same", "diverged", "unanswered", "vacuous"]


@dataclass(frozen=True)
class Divergence:
    """One answer that differs from the one to the same prompt alone: where it stood, and the first difference."""

    prompt: int
    trial: int
    size: int
    position: int
    field: str
    at: int | None
    got: str
    expected: str
    said: str
    command: str = ""


@dataclass
class Trial:
    """One batch: ``size`` prompts in ``requests`` requests, of which ``concurrency`` at once."""

    number: int
    size: int
    requests: int
    concurrency: int
    compared: int = 0
    differing: int = 0
    unanswered: int = 0
    text: str = ""


@dataclass
class Part:
    """One test mode. ``unique`` counts the distinct answers of each prompt, ``unique_tokens`` their distinct tokens.

    ``samples`` are answers, ``compared`` those that had one to be compared with, ``unanswered`` those that never came.
    """

    mode: str
    verdict: Verdict = "vacuous"
    prompts: list[str] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    unique: list[int] = field(default_factory=list)
    unique_tokens: list[int] = field(default_factory=list)
    mismatched: list[int] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    compared: int = 0
    differing: int = 0
    unanswered: int = 0
    first: Divergence | None = None
    divergences: list[Divergence] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def diverged(self, found: Divergence) -> None:
        """Count a divergence, and keep it while there are few."""
        self.differing += 1
        self.first = self.first or found
        if len(self.divergences) < KEPT:
            self.divergences.append(found)

    def judge(self, reasons: list[str]) -> None:
        """Set the verdict: a difference is one whatever else failed; ``reasons`` are those why nothing could have."""
        self.reasons += reasons
        if self.differing:
            self.verdict = "diverged"
        elif self.unanswered:
            self.verdict = "unanswered"
        else:
            self.verdict = "vacuous" if self.reasons or not self.compared else "same"


@dataclass
class ServerResult:
    """Everything that was found. ``control`` are the same modes where a difference is expected."""

    url: str
    api: str
    model: str | None
    seed: int
    sampling: dict[str, Any]
    logprobs: bool
    parts: list[Part] = field(default_factory=list)
    control_name: str = ""
    control: list[Part] = field(default_factory=list)
    requests: int = 0
    retried: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    most_at_once: int = 0
    seconds: float = 0.0
    system_fingerprints: dict[str, int] = field(default_factory=dict)
    """What answers named, and how many did."""
    system_fingerprint: dict[str, Any] | None = None
    """The whole of it, where the server runs under ``detinfer run`` and has it."""
    schema: int = SCHEMA

    def exit_code(self) -> int:
        """1 where bits differ, else 6 where an answer is missing, else 5 where nothing could have differed, else 0."""
        verdicts = {part.verdict for part in self.parts}
        if "diverged" in verdicts:
            return errors.EXIT_DIVERGED
        if "unanswered" in verdicts:
            return errors.EXIT_INFRASTRUCTURE
        return errors.EXIT_VACUOUS if "vacuous" in verdicts or not verdicts else errors.EXIT_SAME

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
