"""The first cause on axes whose runs are not plain calls of the model: pages, graphs, streams and compiled functions.

A plant has one linear layer cut its sum in two wherever the run is of that kind. The GPU's part is played by stand-ins.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from detinfer import deterministic
from detinfer.bits import count_mismatches
from detinfer.goldens import axes, captured
from detinfer.goldens.axes import Walk
from detinfer.goldens.cause.find import find
from detinfer.goldens.cause.script import write
from detinfer.goldens.result import Divergence
from detinfer.goldens.runner import Request, run, run_language_model
from detinfer.models import targets

sys.path.append(str(Path(__file__).parents[1] / "models"))
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
GATE, HEAD, ATTENTION = "model.layers.1.mlp.gate_proj", "lm_head", "model.layers.0.self_attn"
LINEAR, SDPA = "aten::linear", "aten::scaled_dot_product_attention"
on: dict[str, bool] = {}
"""Which kinds of run are under way."""


@contextmanager
def under(kind: str) -> Iterator[None]:
    before, on[kind] = on.get(kind, False), True
    try:
        yield
    finally:
        on[kind] = before


def plant(module: Any, kind: str, path: str, patch: pytest.MonkeyPatch) -> None:
    """A linear layer adds the halves of its sums; of an attention all scales are one unit in the last place off."""
    layer = module.get_submodule(path)
    sound, attention = layer.forward, F.scaled_dot_product_attention

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not on.get(kind):
            return sound(x)
        half = x.shape[-1] // 2
        return F.linear(x[..., :half], layer.weight[:, :half]) + F.linear(x[..., half:], layer.weight[:, half:])

    def scaled(q: torch.Tensor, *given: Any, scale: float, **more: Any) -> torch.Tensor:
        return attention(q, *given, scale=scale * (1 + 2**-22) if on.get(kind) else scale, **more)

    if path == ATTENTION:
        patch.setattr(F, "scaled_dot_product_attention", scaled)
    else:
        layer.forward = forward


class Stream:
    """In place of a CUDA stream."""

    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins that say which kind of run is under way."""

    def capture(step: captured.Step) -> tuple[Callable[[], None], torch.Tensor]:
        result = step().clone()

        def replay() -> None:
            with under("graph"):
                result.copy_(step())

        return replay, result

    def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with under("compiled"):
                return forward(*args)

        return call

    monkeypatch.setattr(captured, "capture", capture)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: under("streams"))
    on.clear()


@pytest.fixture
def llama() -> tuple[Any, list[Request], dict[tuple[int, int], Any]]:
    """A small Llama, its requests, and what each gives alone."""
    return small(torch.float32, "cpu")


def small(dtype: torch.dtype, device: str) -> tuple[Any, list[Request], dict[tuple[int, int], Any]]:
    import zoo

    module = zoo.build("llama", dtype)
    module.register_forward_pre_hook(
        lambda _, __, given: on.update(
            paged="cu_seq_lens_q" in given, static=type(given.get("past_key_values")).__name__ == "StaticCache"
        ),
        with_kwargs=True,
    )
    target = targets.finish("llama", targets.Loaded("causal_lm", module)).to(device)
    found = []
    with deterministic("batch"):
        for row in zoo.tokens(3, 11).tolist():
            _, tokens = run_language_model(target, [Request(tuple(row), steps=5)], lambda _: nullcontext())
            found.append(Request(tuple(row), tokens[0], steps=5))
        return target, found, {(i, s): node for i, one in enumerate(found) for s, node in enumerate(run(target, [one]))}


def diverged(llama: Any, name: str) -> Divergence | None:
    """What the axis finds first, in two cases."""
    walk = Walk(*llama)
    axis = next(axis for axis in axes.AXES if axis.name == name)
    walk.able([name])
    with deterministic("batch"):
        for number in range(2):
            walk.case(axis, number, 0)
    return walk.results[name].first


def located(llama: Any, first: Divergence) -> Any:
    with deterministic("batch"):
        return find(llama[0], llama[1], [], [], first, 0)


@pytest.mark.parametrize(
    ("name", "kind", "path", "operation", "note"),
    [
        ("paged", "paged", GATE, LINEAR, "requests, pages of"),
        ("paged", "paged", HEAD, LINEAR, "requests, pages of"),
        ("paged", "paged", ATTENTION, SDPA, "requests, pages of"),
        ("graph", "graph", GATE, "Linear", "bits differ only under the graph's replay"),
        ("graph", "static", GATE, LINEAR, "run eagerly, the same steps differ too"),
        ("streams", "streams", GATE, "Linear", "bits differ only on other streams"),
        ("compiled", "compiled", GATE, "Linear", "bits differ only as compiled"),
    ],
)
def test_a_plant_is_located(
    name: str,
    kind: str,
    path: str,
    operation: str,
    note: str,
    llama: Any,
    kinds: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer, and where operations can be watched the operation; a sound model has nothing to locate."""
    assert diverged(llama, name) is None
    plant(llama[0].module, kind, path, monkeypatch)
    first = diverged(llama, name)
    assert first is not None and first.axis.startswith(f"{name}: ")
    found = located(llama, first)
    assert found is not None
    cause = found.cause
    assert (cause.path, cause.operation) == (f"LlamaForCausalLM.{path}", operation), cause
    if path == ATTENTION:
        assert (cause.inputs_differing, cause.inputs_unknown) == ([], []), "keys are laid beside those of the run alone"
    assert note in cause.note and 0 < cause.elements_differing <= cause.elements
    assert cause.got != cause.expected
    if found.operations is None:
        from detinfer.errors import UsageError

        with pytest.raises(UsageError, match=path):
            write(found, tmp_path / "show", "batch")
    else:
        assert write(found, tmp_path / "show", "batch").exists()


@pytest.mark.parametrize("name", ["paged", "graph", "streams", "compiled"])
def test_a_divergence_that_does_not_show_again(name: str, llama: Any, kinds: None) -> None:
    """Nothing is named where both runs agree."""
    first = Divergence("", "model", "", "prefill", 0, 1, "", (3,), 0, "", "", None, 1, 1, trial=0, axis=f"{name}: once")
    assert located(llama, first) is None


def really(kind: str) -> bool:
    """Whether a GPU's run of that kind is under way; ``on`` knows of caches and pages."""
    if kind == "graph":
        return torch.cuda.is_current_stream_capturing()
    if kind == "streams":
        return torch.cuda.current_stream() != torch.cuda.default_stream()
    return bool(torch.compiler.is_compiling() if kind == "compiled" else on.get(kind, False))


def halved(module: Any, kind: str) -> None:
    """A layer that cuts its sums in two in runs of that kind."""
    layer = module.get_submodule(GATE)
    sound = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not really(kind):
            return sound(x)
        half = x.shape[-1] // 2
        return F.linear(x[..., :half], layer.weight[:, :half]) + F.linear(x[..., half:], layer.weight[:, half:])

    layer.forward = forward


def test_what_is_compiled_runs_as_it_was_written() -> None:
    """A fault that only compiled code has is not reached under a policy; without one the same function has it."""
    on.clear()
    given = small(torch.float32, "cpu")
    halved(given[0].module, "compiled")
    assert diverged(given, "compiled") is None
    ids = torch.tensor([given[1][0].tokens])
    whole = given[0].module(input_ids=ids).logits
    cut = torch.compile(lambda ids: given[0].module(input_ids=ids).logits, backend="eager")(ids)
    assert count_mismatches(cut, whole) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("name", "kind", "operation", "note"),
    [
        ("paged", "paged", LINEAR, "requests, pages of"),
        ("graph", "graph", "Linear", "bits differ only under the graph's replay"),
        ("graph", "static", LINEAR, "run eagerly, the same steps differ too"),
        ("streams", "streams", "Linear", "bits differ only on other streams"),
    ],
)
def test_a_plant_is_located_on_a_gpu(name: str, kind: str, operation: str, note: str) -> None:
    """Real graphs, streams and pages: sound first, then a layer that cuts its sums in two there."""
    on.clear()
    given = small(torch.bfloat16, "cuda")
    assert diverged(given, name) is None
    halved(given[0].module, kind)
    first = diverged(given, name)
    assert first is not None and first.axis.startswith(f"{name}: ")
    found = located(given, first)
    assert found is not None
    cause = found.cause
    assert (cause.path, cause.operation) == (f"LlamaForCausalLM.{GATE}", operation), cause
    assert note in cause.note and 0 < cause.elements_differing <= cause.elements
