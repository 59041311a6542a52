"""Every decoder of the zoo gives the same logits along every axis that it can be run along; torch alone does not."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer.goldens import axes
from detinfer.goldens.axes import Walk
from detinfer.goldens.result import AxisResult
from detinfer.goldens.runner import Request, run, run_language_model
from detinfer.models import targets
from detinfer.policy import deterministic

sys.path.insert(0, str(Path(__file__).parent))
import zoo

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
CASES = 2
ELSEWHERE = {"graph", "streams", "collectives"}
"""Axes of a GPU, and of several ranks."""
RUN = {axis.name for axis in axes.AXES if axis.way is not None} - ELSEWHERE
CUT_BACK = {"prefix", "speculative"}
"""Axes that take tokens back, which a sliding window's cache cannot do."""

NO_PAGES = {"deepseek_v3": "pages have one width"}


def walked(target: Any, names: Any = axes.NAMES) -> dict[str, AxisResult]:
    """Each axis in two cases, against three prompts of 13 tokens run alone, prefill and five decode steps."""
    prompts = [tuple(row) for row in zoo.tokens(3, 13).tolist()]
    requests = []
    for prompt in prompts:
        _, tokens = run_language_model(target, [Request(prompt, steps=6)], lambda _: nullcontext())
        requests.append(Request(prompt, tokens[0], steps=6))
    alone = {
        (index, step): node
        for index, request in enumerate(requests)
        for step, node in enumerate(run(target, [request]))
    }
    walk = Walk(target, requests, alone)
    for axis in walk.able(names):
        for number in range(CASES):
            walk.case(axis, number, 0)
    return walk.results


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_every_axis_of_every_decoder(name: str) -> None:
    """float32, with the policy: not a row differs; without it rows differ along most axes, so the inputs show order."""
    module = zoo.build(name, torch.float32)
    target = targets.finish(name, targets.Loaded("causal_lm", module))
    with deterministic("batch"):
        found = walked(target)
    slides = "sliding_attention" in (getattr(module.config, "layer_types", None) or ())
    expected = RUN - CUT_BACK if slides else RUN
    if slides or name in NO_PAGES:
        expected = expected - {"paged"}
        assert NO_PAGES.get(name, "sliding windows") in found["paged"].note
    assert {axis for axis, one in found.items() if one.verdict != "not_run"} == expected, found
    assert {axis: one.rows_differing for axis, one in found.items() if one.rows_differing} == {}
    assert all(one.rows_compared for one in found.values() if one.verdict != "not_run")
    with torch.no_grad():
        off = walked(target, [axis.name for axis in axes.AXES if axis.off])
    assert sum(one.rows_differing > 0 for one in off.values()) >= 5
