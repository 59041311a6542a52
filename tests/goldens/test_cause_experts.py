"""The first cause in mixtures of experts, whose rows are picked by what tokens hold: sizes that fit by accident mislead nobody."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import deterministic
from detinfer.goldens.cause.find import find
from detinfer.goldens.cause.locate import by_batch, locate
from detinfer.goldens.result import Cause, Divergence
from detinfer.goldens.runner import Request, run_language_model
from detinfer.goldens.sweep import Trial
from detinfer.models import targets

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "models"))
from odd_batch import LENGTH, planted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
AXES = ("", "chunks: ", "left-padding: ", "speculative: ")
BATCHES = ((2, 0, 1), (0, 0), (1, 2, 0, 0, 2))


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "gpt_oss"])
def model(request: pytest.FixtureRequest) -> tuple[Any, list[Request]]:
    """A small model, and three requests with what was decoded."""
    import zoo

    target = targets.finish(request.param, targets.Loaded("causal_lm", zoo.build(request.param, torch.float32)))
    rows = torch.randint(90, (3, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    with deterministic("batch"):
        for row in rows:
            _, tokens = run_language_model(target, [Request(tuple(row), steps=3)], lambda _: nullcontext())
            found.append(Request(tuple(row), tokens[0], steps=3))
    return target, found


def cause(model: tuple[Any, list[Request]], axis: str, number: int) -> Cause | None:
    """Of a request of that trial, or in that case of an axis."""
    trials = [Trial(i, batch, (0,)) for i, batch in enumerate(BATCHES)]
    batch = BATCHES[number]
    first = Divergence(
        *("", "model", "", "prefill", 0, batch[1], "", (3,), 0, "", "", None, 1, 1),
        trial=number,
        batch=len(batch),
        position=1,
        axis=axis,
    )
    with deterministic("batch"):
        located = find(model[0], model[1], [], trials, first, 0)
    return None if located is None else located.cause


def test_a_sound_model_has_none(model: tuple[Any, list[Request]]) -> None:
    """Experts have other numbers of rows in every run, other experts have any at all, and nothing is named."""
    assert [cause(model, axis, number) for axis in AXES for number in range(len(BATCHES))] == [None] * 12


@pytest.mark.parametrize(
    ("what", "path", "axis", "operation"),
    [
        ("product", "model.layers.1.self_attn.o_proj", "", "aten::linear"),
        ("product", "lm_head", "", "aten::linear"),
        ("piece", "model.layers.1.self_attn.k_proj", "chunks: ", "aten::linear"),
        ("expert", "model.layers.1.mlp.experts", "", None),
    ],
)
def test_what_comes_after_experts(
    what: str, path: str, axis: str, operation: str | None, model: tuple[Any, list[Request]]
) -> None:
    """A fault behind the first layer's experts is named, and one in the second's; of those rows an operation may be any."""
    with planted(model[0].module, what, path, here=True):
        found = cause(model, axis, 0)
    assert found is not None and found.path.endswith(path), found
    assert operation is None or found.operation == operation
    assert found.got != found.expected and found.elements_differing > 0


@pytest.mark.parametrize("faulty", [False, True])
def test_tensors_without_memory_of_their_own(faulty: bool) -> None:
    """A sparse operand is followed like any other: the product after it is named where it is wrong, and nowhere else."""
    sparse, x = torch.eye(6).to_sparse(), torch.arange(12.0).reshape(6, 2)

    def run(batch: int) -> None:
        y = torch.sparse.mm(sparse, x).t()[None].expand(batch, 2, 6).contiguous()
        y @ (torch.eye(6) * (1 + 2**-20 * (faulty and batch > 1)))

    found = locate(lambda _: run(1), lambda _: run(3), by_batch(3, 1))
    assert (found is None) != faulty
    assert found is None or found.cause.operation == "aten::mul.Tensor"
