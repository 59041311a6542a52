"""CUDA graphs and streams as axes: their logic with stand-ins on the CPU, the real ones on a GPU."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from detinfer import bits, deterministic
from detinfer.goldens import axes, captured
from detinfer.goldens.axes import Walk
from detinfer.goldens.result import AxisResult
from detinfer.goldens.runner import Request, run, run_language_model
from detinfer.goldens.schedules import Model, expected
from detinfer.models import targets

sys.path.append(str(Path(__file__).parents[1] / "models"))
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def asked(target: Any, zoo: Any) -> tuple[list[Request], dict[tuple[int, int], Any]]:
    """Three prompts of 11 tokens with five decode steps, and what each gives alone."""
    found = []
    for row in zoo.tokens(3, 11).tolist():
        _, tokens = run_language_model(target, [Request(tuple(row), steps=6)], lambda _: nullcontext())
        found.append(Request(tuple(row), tokens[0], steps=6))
    return found, {(i, s): node for i, one in enumerate(found) for s, node in enumerate(run(target, [one]))}


@pytest.fixture
def llama() -> Any:
    import zoo

    target = targets.finish("llama", targets.Loaded("causal_lm", zoo.build("llama", torch.float32)))
    with deterministic("batch"):
        found, results = asked(target, zoo)
    return Model(target, found), expected(results, found)


def differing(way: Callable[..., Any], model: Model, wanted: list[torch.Tensor]) -> tuple[int, int]:
    """(rows, rows that differ) of two cases."""
    rows = differ = 0
    with deterministic("batch"):
        for case in range(2):
            for found in way(model, random.Random(case)):
                for (request, position), row in zip(found.places, found.flat(), strict=True):
                    rows += 1
                    differ += bits.as_bytes(row) != bits.as_bytes(wanted[request][position])
    return rows, differ


def standin(stale: bool) -> Callable[..., Any]:
    """In place of a graph: the step itself, run again at each replay; ``stale`` gives the first result at all of them."""

    def capture(step: captured.Step) -> tuple[Callable[[], None], torch.Tensor]:
        for _ in range(2):
            step()
        result = step().clone()

        def replay() -> None:
            again = step()
            if not stale:
                result.copy_(again)

        return replay, result

    return capture


def test_replays_follow_the_tokens(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decoded position of each row of the batch; a graph that does not see its new tokens shows."""
    monkeypatch.setattr(captured, "capture", standin(stale=False))
    rows, differ = differing(captured.graph, *llama)
    assert rows >= 2 * 2 * 5 and differ == 0
    monkeypatch.setattr(captured, "capture", standin(stale=True))
    rows, differ = differing(captured.graph, *llama)
    assert differ > rows // 2


class Stream:
    """In place of torch.cuda.Stream: notes who waits for whom."""

    waits: ClassVar[list[tuple[Any, Any]]] = []

    def wait_stream(self, other: Any) -> None:
        Stream.waits.append((self, other))


def test_streams_wait_for_what_they_read(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of three runs; each stream waits for the one that made its input, and that one for each."""
    main = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    Stream.waits.clear()
    rows, differ = differing(captured.streams, *llama)
    assert rows >= 2 * 3 * 2 * 16 and differ == 0
    assert sum(other is main for _, other in Stream.waits) == sum(one is main for one, _ in Stream.waits) == 2 * 3


def test_why_they_do_not_run_on_a_cpu(llama: Any) -> None:
    """The report says so, and says why a sum over ranks has no other path on one rank."""
    walk = Walk(
        targets.finish("llama", targets.Loaded("causal_lm", llama[0].module)), [Request((5, 6), (7,), steps=2)], {}
    )
    able = {axis.name for axis in walk.able(axes.NAMES)}
    assert not able & {"graph", "streams", "collectives", "tp"}
    notes = {name: walk.results[name].note for name in ("graph", "streams", "collectives")}
    assert notes == {
        "graph": "the model runs on the CPU",
        "streams": "the model runs on the CPU",
        "collectives": "the model is on one rank: --tp N",
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_every_axis_on_a_gpu(name: str) -> None:
    """bfloat16: graph and streams among them, not a row differs; what cannot be run says why."""
    import zoo

    module = zoo.build(name, torch.bfloat16)
    target = targets.finish(name, targets.Loaded("causal_lm", module)).to("cuda")
    found: dict[str, AxisResult] = {}
    with deterministic("batch"):
        requests, results = asked(target, zoo)
        walk = Walk(target, requests, results)
        for axis in walk.able(axes.NAMES):
            for number in range(2):
                walk.case(axis, number, 0)
        found = walk.results
    ran = {axis: one for axis, one in found.items() if one.verdict != "not_run"}
    assert {"graph", "streams", "chunks", "prefill-decode", "paged"} <= ran.keys(), found
    assert {axis: one.rows_differing for axis, one in ran.items() if one.rows_differing} == {}
