"""The paged axis: rows of transformers' continuous batching told apart by their tokens, and compared."""

from __future__ import annotations

import importlib.util
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import bits, deterministic
from detinfer.goldens import paged
from detinfer.goldens.runner import Request, run, run_language_model
from detinfer.goldens.schedules import Model, expected
from detinfer.models import targets

sys.path.append(str(Path(__file__).parents[1] / "models"))
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
LENGTHS = (13, 5, 9, 13)


def requests(target: Any, zoo: Any) -> list[Request]:
    """Prompts of several lengths, each with the tokens that six greedy steps choose."""
    found = []
    for seed, length in enumerate(LENGTHS):
        prompt = tuple(zoo.tokens(length, seed=seed).tolist())
        found.append(
            Request(prompt, run_language_model(target, [Request(prompt, steps=6)], lambda _: nullcontext())[1][0])
        )
        found[-1].steps = 6
    return found


def compared(model: Model, wanted: list[torch.Tensor], cases: int = 4) -> tuple[set[tuple[int, int]], int, int]:
    """(places of rows, rows, rows that differ) of some cases."""
    places, rows, differ = set(), 0, 0
    for case in range(cases):
        for found in paged.paged(model, random.Random(case)):
            for (request, position), row in zip(found.places, found.flat(), strict=True):
                places.add((request, position))
                rows += 1
                differ += bits.as_bytes(row) != bits.as_bytes(wanted[request][position])
    return places, rows, differ


def test_pages_change_nothing_and_a_split_of_sums_by_rows_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every last position of a prompt and every decoded one; then linear cuts K in two where it has many rows."""
    import zoo

    target = targets.finish("llama", targets.Loaded("causal_lm", zoo.build("llama", torch.float32)))
    with deterministic("batch"):
        asked = requests(target, zoo)
        results = {(i, s): node for i, one in enumerate(asked) for s, node in enumerate(run(target, [one]))}
        model, wanted = Model(target, asked), expected(results, asked)
        places, rows, differ = compared(model, wanted)
    assert differ == 0
    assert places >= {(i, len(one.tokens) - 1 + step) for i, one in enumerate(asked) for step in range(6)}
    assert rows >= 48
    own = torch.nn.functional.linear

    def planted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        half = x.shape[-1] // 2
        if x.numel() // x.shape[-1] < 12:
            return own(x, weight, bias)
        return own(x[..., :half], weight[:, :half], bias) + own(x[..., half:], weight[:, half:])

    monkeypatch.setattr(torch.nn.functional, "linear", planted)
    with deterministic("batch"):
        assert compared(model, wanted, 1)[2] > 0


def test_requests_that_a_token_cannot_tell_apart_do_not_run_together() -> None:
    """Requests 0 and 1 decode the same token at the same place after other ones; 2 agrees with 0 all the way."""
    tokens = [[5, 6, 7, 8], [9, 6, 7, 4], [5, 6, 7, 8], [1, 2, 3, 9]]
    assert paged.apart(tokens, [2, 2, 2, 2], [0, 1, 2, 3]) == [0, 2, 3]
    assert paged.apart(tokens, [3, 3, 3, 3], [1, 0, 2, 3]) == [1, 0, 2, 3], "their prompts alone have that token"


def test_rows_of_a_packed_batch() -> None:
    """A piece of a prompt, a decoded token, a place that is not used, and a segment that is nobody's."""
    tokens = [[5, 6, 7, 8, 9], [1, 2, 3, 4, 6]]
    seen = paged.Seen([7, 8, 6, 3, 9], [2, 3, 4, 2, 4], [0, 2, 3, 4, 5], [1, 2, 0, 4, 3])
    assert paged.rows_of(seen, tokens, [0, 1]) == [(0, 0, 3), (1, 1, 4), (3, 0, 4), (4, 1, 2)]
    other = paged.Seen([9], [3], [0, 1], [0])
    assert paged.rows_of(other, tokens, [0, 1]) == []


@pytest.mark.parametrize(("name", "why"), [("olmoe", "gathers keys and values"), ("qwen3", None)])
def test_plans_whose_keys_fit_no_page(name: str, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over ranks a plan may give every rank all keys, and transformers' pages have room for a share: said before, not met."""
    import zoo

    model = Model(targets.finish(name, targets.Loaded("causal_lm", zoo.build(name, torch.float32))), [])
    assert paged.needs(model) is None, "on one rank there is no share"
    monkeypatch.setattr(Model, "ranked", True)
    said = paged.needs(model)
    assert said is None if why is None else said is not None and why in said
