"""The first cause on three ranks: the layer, the operation and the ranks on which it goes wrong, the same on all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer.collectives.launch import launch
from detinfer.errors import UsageError
from detinfer.goldens.cause import agreed
from detinfer.goldens.cause.locate import CHANCE, Located
from detinfer.goldens.cause.operations import Key
from detinfer.goldens.cause.script import write
from detinfer.goldens.result import Cause
from detinfer.models.ranks import Ranks

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "models"))
import cause_ranks
from cause_ranks import Fault

OUT, LINEAR = "layers.0.self_attn.o_proj", "aten::linear"
SUM, SUMS = "layers.0.self_attn.all_reduce", "detinfer::all_reduce"
ALL = (0, 1, 2)
DENSE: dict[str, tuple[Fault, str, str]] = {
    "a rank's part of a sum": (("product", OUT, (2,), "", "batch"), OUT, LINEAR),
    "every rank's columns": (
        ("product", "layers.1.feed_forward.up_proj", ALL, "", "batch"),
        "layers.1.feed_forward.up_proj",
        LINEAR,
    ),
    "a rank's attention": (
        ("attention", "", (1,), "", "batch"),
        "layers.0.self_attn",
        "aten::scaled_dot_product_attention",
    ),
    "two ranks' heads": (
        ("product", "layers.1.self_attn.k_proj", (0, 2), "", "batch"),
        "layers.1.self_attn.k_proj",
        LINEAR,
    ),
    "a rank's input, by chance": (("chance", OUT, (2,), "", "batch"), OUT, "aten::mul.Tensor"),
    "a sum": (("sum", "", ALL, "", "batch"), SUM, SUMS),
    "a sum that one rank has otherwise": (("sum", "", (1,), "", "batch"), SUM, SUMS),
    "a chunk of a prefill": (
        ("piece", "layers.1.self_attn.q_proj", (1,), "chunks: ", "batch"),
        "layers.1.self_attn.q_proj",
        LINEAR,
    ),
}
PROJECTION, GATE = "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.gate_proj"
LLAMA: dict[str, tuple[Fault, str, str]] = {
    "a rank's part of a sum": (("product", PROJECTION, (2,), "", "batch"), PROJECTION, LINEAR),
    "a sum": (("group", "", ALL, "", "batch"), PROJECTION, "c10d::allreduce_"),
    "a sum that one rank has otherwise": (("group", "", (0,), "", "batch"), PROJECTION, "c10d::allreduce_"),
    "a rank's vocabulary": (("product", "lm_head", (1,), "", "batch"), "lm_head", LINEAR),
    "packed, paged": (("piece", GATE, (1,), "paged: ", "batch"), GATE, LINEAR),
    "compiled": (("compiled", GATE, (1,), "compiled: ", "batch"), GATE, "Linear"),
    "with the policy off": (("product", "model.layers.0.self_attn.q_proj", ALL, "", "off"), "q_proj", "aten::mm"),
}


def causes(spec: str, faults: dict[str, tuple[Fault, str, str]]) -> list[Any]:
    """What rank 0 found, and that the others have the same cause; the first of its ranks alone has the operation."""
    found = launch(cause_ranks.run, 3, spec, [fault for fault, _, _ in faults.values()])
    assert isinstance(found, dict), "no rank left early"
    for everyone in zip(*(found[rank] for rank in range(3)), strict=True):  # they came in any order
        cause = everyone[0][0]
        assert all(other == cause for other, _ in everyone)
        holds = [rank for rank, (_, operation) in enumerate(everyone) if operation]
        alone = cause is not None and cause.operation.startswith("aten::") and CHANCE not in cause.note
        assert holds == (cause.ranks[:1] if alone else [])
    return [cause for cause, _ in found[0]]


def check(cause: Cause, fault: Fault, path: str, operation: str) -> None:
    """It names where the fault is, and the element."""
    assert cause is not None and (cause.path.endswith(path), cause.operation, cause.ranks) == (
        True,
        operation,
        list(fault[2]),
    ), cause
    assert cause.got != cause.expected and cause.ulp and 0 < cause.elements_differing <= cause.elements
    assert (cause.repeats, cause.note == CHANCE) == ((False, True) if fault[0] == "chance" else (True, False))
    if fault[0] in ("sum", "group", "attention"):
        assert (cause.inputs_differing, cause.inputs_unknown) == ([], []), "every rank's inputs agree"


def test_a_built_in_model() -> None:
    """A fault each, then none: nothing is named once it is taken out."""
    found = causes("builtin:dense", DENSE)
    assert [cause is None for cause in found] == [False, True] * len(DENSE)
    for cause, (fault, path, operation) in zip(found[::2], DENSE.values(), strict=True):
        check(cause, fault, path, operation)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_transformers_model(tmp_path: Path) -> None:
    """Cut by its own plan: sums are torch.distributed's, gathered vocabulary too."""
    import zoo

    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 90}
    zoo.build("llama", torch.float32, **heads).save_pretrained(tmp_path)
    found = causes(f"hf:{tmp_path}", LLAMA)
    faulty, off = found[:-1:2], found[-1]
    assert all(cause is None for cause in found[1:-1:2])
    for cause, (fault, path, operation) in zip([*faulty, off], LLAMA.values(), strict=True):
        check(cause, fault, path, operation)


class Told(Ranks):
    """Rank 0 of several, which share what a test says."""

    def __init__(self, *others: Any) -> None:
        super().__init__()
        self.size, self._others = 1 + len(others), others

    def share(self, value: Any, first: bool = False) -> list[Any]:
        return [value, *self._others]


KEYS = [Key("a", "", 0), Key("sum", "", 0, joint=True), Key("b", "", 0), Key("sum", "", 0, joint=True)]
BESIDE = {number: number for number in range(4)}


@pytest.mark.parametrize(
    ("own", "others", "wanted"),
    [
        (None, (None, None), None),
        (1, ((0, False, 0), (0, True, 0)), agreed.First(None, [1], False)),
        (1, ((0, True, 0), None), agreed.First(1, [0, 1], True)),
        (None, (None, (1, True, 0)), agreed.First(3, [2], True)),
        (2, ((1, True, 0), (1, False, 2)), agreed.First(2, [0, 2], False)),
    ],
    ids=["none", "before a sum", "a sum", "another's sum", "after a sum"],
)
def test_which_comes_first(own: int | None, others: tuple[Any, ...], wanted: agreed.First | None) -> None:
    """By the sums before it: what a rank does on its own comes before the sum that spreads it."""
    assert agreed.first(_deaf(Told(*others)), KEYS, BESIDE, own) == wanted


def _deaf(ranks: Told) -> Told:
    ranks.any = bool  # type: ignore[method-assign]  # what the others share is of another kind
    return ranks


def test_a_sum_that_cannot_be_laid_beside_on_every_rank() -> None:
    """Nothing is named, on all ranks, and nobody waits for a rank that could not take part."""
    assert agreed.first(_deaf(Told((1, True, 0))), KEYS, {0: 0, 1: 1}, None) is None


def test_what_a_sum_is_given() -> None:
    """It names the ranks whose part differs already, and what any rank knows of it counts for all."""
    cause = Cause("sum", "layer", "float32", "", "", (0,), "0x1", "0x0", 1, 1, 1)
    told = agreed.together(
        Told(agreed.Known(cause, [0], [], False), agreed.Known(None, [], [1], True)),
        agreed.First(1, [0, 1], True),
        agreed.Known(cause, [], [], True),
    )
    assert (told.ranks, told.inputs_differing, told.inputs_unknown, told.repeats) == ([0, 1], [0], [1], False)
    assert told.note == "what it is given differs already on rank 1"


def test_a_script_of_a_sum_is_refused(tmp_path: Path) -> None:
    """All ranks make it together; nothing is written."""
    cause = Cause(SUMS, SUM, "float32", "", "", (0,), "0x1", "0x0", 1, 1, 1, ranks=[0, 1, 2])
    with pytest.raises(UsageError, match=f"all ranks make {SUMS} of {SUM} together"):
        write(Located(cause), tmp_path / "show", "batch")
    assert not (tmp_path / "show").exists()
