"""Every axis holds on a sound model, and each one notices a model whose bits depend on just that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detinfer import cli
from detinfer.collectives import all_reduce, calls
from detinfer.errors import UsageError
from detinfer.goldens import axes, schedules
from detinfer.goldens.axes import AXES, Walk
from detinfer.goldens.result import AxisResult
from detinfer.goldens.runner import Request, run, run_language_model
from detinfer.models import targets
from detinfer.policy import deterministic

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
import tiny

ELSEWHERE = ("paged", "graph", "streams", "collectives")
"""Axes with tests of their own: test_paged.py, test_captured.py, and below."""
RUN = tuple(axis.name for axis in AXES if axis.way is not None and axis.name not in ELSEWHERE)
CASES = 4


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of two layers with weights from integers."""
    return targets.finish("tiny", targets.Loaded("causal_lm", tiny.language_model()))


@contextmanager
def nothing(_: int) -> Iterator[None]:
    yield


def walked(target: Any, names: tuple[str, ...], alone: Any = None, seed: int = 0) -> dict[str, AxisResult]:
    """The outcome of these axes, under a policy, against what ``alone`` (default: the target) gives."""
    draw = torch.Generator().manual_seed(7)
    prompts = [tuple(torch.randint(tiny.VOCABULARY, (9,), generator=draw).tolist()) for _ in range(3)]
    with deterministic("batch"):
        requests = []
        for prompt in prompts:
            _, tokens = run_language_model(alone or target, [Request(prompt, steps=6)], nothing)
            requests.append(Request(prompt, tokens[0], steps=6))
        results = {
            (index, step): node
            for index, request in enumerate(requests)
            for step, node in enumerate(run(alone or target, [request]))
        }
        walk = Walk(target, requests, results)
        for axis in walk.able(names):
            for number in range(CASES):
                walk.case(axis, number, seed)
    return walk.results


def test_a_sound_model_is_the_same_along_every_axis(model: Any) -> None:
    """Every axis that can be run compares rows and finds none that differs; the others say why they were not."""
    found = walked(model, axes.NAMES)
    assert {name for name, one in found.items() if one.verdict == "same"} == {*RUN, "paged"}
    assert all(one.rows_compared > 20 and one.rows_differing == 0 for one in found.values() if one.name in RUN)
    assert all(one.note for one in found.values() if one.name not in (*RUN, "paged"))


class Faulty(torch.nn.Module):
    """The model, but its logits are one unit in the last place off where ``wrong`` says so."""

    def __init__(self, module: Any, wrong: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.config, self._wrong = module, module.config, wrong

    def forward(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        attention_mask: Any = None,
        position_ids: Any = None,
    ) -> Any:
        held = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        wrong = self._wrong(input_ids, past_key_values, held, attention_mask)
        output = self.module(
            input_ids=input_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        if wrong:
            bits = output.logits.view(torch.int32)
            bits[..., -1] ^= 1
        return output


Faulty.__module__ = "transformers.test"  # so that it may be given another KV cache

FAULTS: dict[str, Callable[..., bool]] = {
    "permutation": lambda ids, cache, held, mask: cache is None and len(ids) > 2,
    "left-padding": lambda ids, cache, held, mask: mask is not None and bool((mask[:, 0] == 0).any()),
    "right-padding": lambda ids, cache, held, mask: (
        mask is not None and cache is None and bool((mask[:, -1] == 0).any())
    ),
    "chunks": lambda ids, cache, held, mask: held > 0 and ids.shape[1] > 1,
    "prefill-decode": lambda ids, cache, held, mask: held == 0 and ids.shape[1] > 9,
    "prefix": lambda ids, cache, held, mask: held not in (0, 9) and ids.shape[1] > 1,
    "static-cache": lambda ids, cache, held, mask: type(cache).__name__ == "StaticCache",
    "speculative": lambda ids, cache, held, mask: held == 9 and ids.shape[1] > 1,
    "threads": lambda ids, cache, held, mask: torch.get_num_threads() == 3,
    "compiled": lambda ids, cache, held, mask: called_by("compiled"),
    "collectives": lambda ids, cache, held, mask: calls.steering() == "2stage",
}


def called_by(name: str) -> bool:
    """Whether a function of the schedules is on the stack."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == name and frame.f_globals.get("__name__") == schedules.__name__:
            return True
        frame = frame.f_back
    return False


@pytest.mark.parametrize("name", [*RUN, "collectives"])
def test_an_axis_notices_what_depends_on_it(name: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is wrong only when run this way: the axis diverges and says where."""
    if name == "collectives":
        monkeypatch.setattr(schedules.Model, "ranked", True)
    faulty = targets.Target(**{**vars(model), "module": Faulty(model.module, FAULTS[name])})
    found = walked(faulty, (name,), alone=model)[name]
    assert (found.verdict, found.rows_differing > 0) == ("diverged", True)
    assert found.first is not None
    assert found.first.axis.startswith(f"{name}: ")
    assert found.first.ulp == 1
    assert walked(model, (name,))[name].verdict == "same"


def test_the_mask_of_a_hole_is_no_key(model: Any) -> None:
    """Decoding behind right padding: the keys before and after the hole are summed as if it were not there."""
    for seed in range(3):
        found = walked(model, ("right-padding",), seed=seed)["right-padding"]
        assert (found.verdict, found.rows_differing) == ("same", 0)


@pytest.mark.parametrize("path", ["1stage", "2stage"])
def test_a_path_that_is_steered_is_taken(path: Any) -> None:
    """By sums that name none, whatever their size; one that names its own keeps it, and afterwards the size decides."""
    taken = []

    class Alone:
        size, _lock = 3, nullcontext()

        def prepare(self, key: Any, fill: Any) -> Any:
            fill(call := calls.Call())
            taken.append((call.path, key[-1]))
            return SimpleNamespace()

        def finish(self, args: Any) -> None:
            """Nobody else is there."""

    small, large = torch.zeros(5), torch.zeros(1 << 16)
    ranks: Any = Alone()
    with calls.steered(path):
        for x in (small, large):
            all_reduce.all_reduce(ranks, x, "sum", "rank_order", None, None)
        all_reduce.all_reduce(ranks, small, "sum", "rank_order", "1stage", None)
    for x in (small, large):
        all_reduce.all_reduce(ranks, x, "sum", "rank_order", None, None)
    number = calls.PATH_NUMBERS[path]
    assert taken == [(number, path)] * 2 + [(0, "1stage"), (0, None), (1, None)]


def test_names_of_axes() -> None:
    """All by default; another name, or none, is an error that lists them."""
    assert axes.chosen(None) == axes.NAMES
    assert axes.chosen("chunks, batch,chunks") == ("chunks", "batch")
    for wrong in ("chunk", "", ","):
        with pytest.raises(UsageError, match="there are batch, position"):
            axes.chosen(wrong)


def test_verify_with_axes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Axes alone leave the trials out; what a built-in model has no parameters for is said."""
    assert cli.run(["record", "builtin:dense", "-o", str(tmp_path / "golden")]) == 0
    assert cli.run(["verify", str(tmp_path / "golden"), "--n-trials", "10", "--axes", "chunks,left-padding"]) == 0
    out = capfd.readouterr().out
    assert "0 trials" in out
    assert "its forward takes no mask" in " ".join(out.split())
    assert cli.run(["verify", str(tmp_path / "golden"), "--axes", "diagonal"]) == 2
