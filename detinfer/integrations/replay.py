"""Ask a model some of its questions again, in other company, and compare the answers byte for byte.

Knows nothing of any library: a question has a name and something that the library understands, an answer is a float, a
string, or a tuple of them.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from detinfer.integrations.composition import Batches, Tokens

Answer = Any
Ask = Callable[[list[Any], int], Sequence[Answer]]
"""The answers to questions, asked with this batch size."""

MOST_NAMED = 50
"""Divergences that are written out; further ones are counted."""


def as_bytes(answer: Answer) -> bytes:
    """The bytes of an answer: floats as their 64 bits, so that -0.0 is not 0.0; no two answers share them."""
    if isinstance(answer, bool):
        return b"b1" if answer else b"b0"
    if isinstance(answer, float):
        return b"f" + struct.pack("<d", answer)
    if isinstance(answer, tuple | list):
        parts = [as_bytes(part) for part in answer]
        return b"t" + b"".join(struct.pack("<q", len(part)) + part for part in parts)
    text = f"{type(answer).__name__}:{answer}"
    return b"s" + text.encode("utf-8", "surrogatepass")


def same(a: Answer, b: Answer) -> bool:
    """Whether two answers have the same bytes."""
    return as_bytes(a) == as_bytes(b)


def shown(answer: Answer) -> str:
    """An answer for people; floats with their bits."""
    first = answer[0] if isinstance(answer, tuple | list) and answer else answer
    return f"{answer!r} ({first.hex()})" if isinstance(first, float) else repr(answer)


@dataclass(frozen=True)
class Question:
    """``name`` says which one it is; ``comparable`` is False where the answer is drawn at random."""

    name: str
    request: Any
    same_as: str
    comparable: bool = True


@dataclass(frozen=True)
class Divergence:
    """A question that was answered differently: ``how`` it was asked the second time."""

    question: str
    how: str
    expected: str
    got: str


@dataclass
class Report:
    """What a replay came to. ``changed`` questions stood in another batch than before; ``unobserved`` could not be seen."""

    asked: int = 0
    replayed: int = 0
    compared: int = 0
    changed: int = 0
    unobserved: int = 0
    drawn: int = 0
    diverged: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def verdict(self) -> Literal["same", "diverged", "vacuous"]:
        """Vacuous where no question was seen in another batch: nothing could have failed."""
        if self.diverged:
            return "diverged"
        return "same" if self.changed else "vacuous"

    def note(self, divergence: Divergence) -> None:
        """Count a divergence, and keep it while there are few."""
        self.diverged += 1
        if len(self.divergences) < MOST_NAMED:
            self.divergences.append(divergence)

    def add(self, other: Report) -> None:
        """Put another replay's counts to these."""
        for name in ("asked", "replayed", "compared", "changed", "unobserved", "drawn", "diverged"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.divergences = (self.divergences + other.divergences)[:MOST_NAMED]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"verdict": self.verdict} | asdict(self)


@dataclass(frozen=True)
class Plan:
    """How much is replayed: ``sample`` questions of each kind, chosen and ordered by ``seed``, ``most`` in a batch."""

    sample: int = 16
    seed: int = 0
    most: int = 8


def replay(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    before: Batches | None,
    ask: Ask,
    plan: Plan,
    module: torch.nn.Module | None,
    prompt_only: bool = False,
    equal: Callable[[Answer, Answer], bool] | None = None,
) -> Report:
    """Ask a sample of ``questions`` alone and in drawn batches, and compare with ``answers``.

    ``before`` is what was noted while ``answers`` were made, ``module`` the one it was noted of. ``prompt_only``: later
    calls for a question are of tokens that the model made itself. ``equal`` says whether two answers are the same, where it
    is not simply their bytes.
    """
    equal = equal or same
    report = Report(asked=len(questions), drawn=sum(not question.comparable for question in questions))
    firsts: dict[str, int] = {}
    for number, question in enumerate(questions):
        if question.comparable:
            firsts.setdefault(question.same_as, number)
    numbers = list(firsts.values())
    generator = random.Random(plan.seed)
    chosen = generator.sample(numbers, min(plan.sample, len(numbers)))
    report.replayed = len(chosen)
    moved: set[int] = set()
    tokens: dict[int, list[Tokens]] = {}

    def again(group: list[int], how: str) -> Batches | None:
        watch = Batches(module) if module is not None else None
        with watch or nullcontext():
            got = ask([questions[number].request for number in group], len(group))
        for number, answer in zip(group, got, strict=True):
            report.compared += 1
            if not equal(answer, answers[number]):
                report.note(Divergence(questions[number].name, how, shown(answers[number]), shown(answer)))
        return watch

    def compare_places(number: int, now: Batches) -> None:
        assert before is not None
        for row in tokens[number]:
            there = before.holding(row)
            if there and now.holding(row) - there:
                moved.add(number)

    for number in chosen:
        alone = again([number], "alone")
        if alone is not None and before is not None:
            calls = alone.calls[:1] if prompt_only else alone.calls
            tokens[number] = [row for call in calls for row in call]
            compare_places(number, alone)
    for group in _groups(chosen, numbers, plan, generator):
        now = again(group, f"in a batch of {len(group)}")
        if now is not None and before is not None:
            for number in group:
                if number in tokens:
                    compare_places(number, now)
    report.changed = len(moved)
    report.unobserved = 0 if module is not None else len(chosen)
    return report


def _groups(chosen: list[int], all_numbers: list[int], plan: Plan, generator: random.Random) -> list[list[int]]:
    """Every chosen question in one batch of 2 to ``most``, with others drawn from all, in a drawn order."""
    rest, found = chosen[:], []
    generator.shuffle(rest)
    while rest and len(all_numbers) > 1:
        size = min(generator.randint(2, max(2, plan.most)), len(all_numbers))
        group = [rest.pop() for _ in range(min(len(rest), (size + 1) // 2))]
        others = [number for number in all_numbers if number not in group]
        group += generator.sample(others, min(size - len(group), len(others)))
        generator.shuffle(group)
        found.append(group)
    return found
