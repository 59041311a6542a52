"""Replays of a small model that is asked directly: what is compared, what is seen, what is vacuous."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from detinfer.integrations.composition import Batches
from detinfer.integrations.replay import Plan, Question, Report, as_bytes, replay


class Table(torch.nn.Module):
    """The sum of each row's values; ``fault`` is added to rows of a batch of more than 3 that hold the token 7."""

    fault = 0.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values = ids.double().sum(1)
        return torch.where((ids == 7).any(1), values + self.fault, values) if len(ids) > 3 else values


def asked(
    model: Table, prompts: list[list[int]], most: int = 8, always_alone: bool = False, **plan: Any
) -> tuple[Report, list[float]]:
    """The report of a replay of ``prompts``, all of which were asked in batches of 5 at first, and the answers."""

    def ask(group: list[list[int]], size: int) -> list[float]:
        found: list[float] = []
        step = 1 if always_alone else size
        for start in range(0, len(group), step):
            part = group[start : start + step]
            longest = max(map(len, part))
            found += model(torch.tensor([row + [0] * (longest - len(row)) for row in part])).tolist()
        return found

    questions = [Question(f"q{number}", row, str(row)) for number, row in enumerate(prompts)]
    with Batches(model) as before:
        answers = ask(prompts, 5)
    return replay(questions, answers, before, ask, Plan(most=most, **plan), model), answers


PROMPTS = [[number + 1] * (2 + number % 4) for number in range(12)]


def test_the_same_answers() -> None:
    """Every question is seen in another batch, and more than twice as many answers are compared."""
    report, _ = asked(Table(), PROMPTS)
    assert (report.verdict, report.replayed, report.changed) == ("same", 12, 12)
    assert report.compared >= 2 * 12


@pytest.mark.parametrize("fault", [2.0**-40, math.nan])
def test_a_fault_that_depends_on_the_batch(fault: float) -> None:
    """The one question whose row holds the token is named, alone against its batch of 5; a small one is enough."""
    model = Table()
    model.fault = fault
    report, _ = asked(model, PROMPTS)
    assert report.verdict == "diverged"
    assert {one.question for one in report.divergences} == {"q6"}
    assert report.divergences[0].how == "alone" and "0x" in report.divergences[0].got


def test_batches_that_did_not_change_are_vacuous() -> None:
    """A library that asks everything alone, whatever it is given; and a single question that was alone at first."""
    report, _ = asked(Table(), PROMPTS, always_alone=True)
    assert (report.verdict, report.changed, report.compared > 12) == ("vacuous", 0, True)
    report, _ = asked(Table(), PROMPTS[:1])
    assert (report.verdict, report.changed) == ("vacuous", 0)


def test_the_seed_decides() -> None:
    """The same seed replays the same questions in the same batches; another one others."""
    model = Table()
    seen: list[list[bytes]] = []
    for seed in (0, 0, 1):
        with Batches(model) as watch:
            asked(model, PROMPTS, sample=4, seed=seed)
        seen.append([call.tobytes() for call in watch.calls])
    assert seen[0] == seen[1] != seen[2]


def test_rows_are_found_padded_on_either_side() -> None:
    """And not as a part of a longer row."""
    model = Table()
    with Batches(model) as watch:
        model(torch.tensor([[5, 6, 0, 0], [0, 0, 8, 9]]))
        model(torch.tensor([[5, 6, 1, 2]]))
    rows = torch.tensor([[5, 6], [8, 9], [6, 1]]).numpy()
    assert [len(watch.holding(row)) for row in rows] == [1, 1, 0]


def test_bytes_of_answers() -> None:
    """Values that Python calls equal and values of another kind are not the same answer."""
    answers: list[Any] = [0.0, -0.0, 0, False, "0", (0.0,), (0.0, False), (-0.0, False), "f", ("a", "b"), ("ab", "")]
    assert len({as_bytes(answer) for answer in answers}) == len(answers)
    assert as_bytes(math.nan) == as_bytes(math.nan)
