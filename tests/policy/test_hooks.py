"""What a policy puts into transformers: whichever form a model was configured with, ours runs; then all is put back."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import bits, deterministic
from detinfer.errors import RefusedError
from detinfer.policy import Guarantee, Policy, hooks

sys.path.append(str(Path(__file__).parents[1] / "models"))
import zoo

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def held() -> list[Any]:
    """What stands in every place of the list now."""
    found = []
    for hook in hooks.HOOKS:
        holder: Any = importlib.import_module(hook.module)
        for name in hook.attribute.split("."):
            holder = getattr(holder, name)
        found.append(holder)
    return found


def test_every_place_is_put_back_also_after_an_error() -> None:
    before = held()
    with deterministic("batch"), deterministic("batch", uncovered="trust"):
        inside = held()
    assert not any(one is two for one, two in zip(before, inside, strict=True))
    assert held() == before
    with pytest.raises(ZeroDivisionError), deterministic("batch"):
        raise ZeroDivisionError
    assert held() == before


@pytest.mark.parametrize("name", zoo.MIXTURES)
def test_every_form_gives_the_same_bytes(name: str) -> None:
    """eager, grouped_mm and batched_mm are replaced: they differ from each other or from ours without a policy."""
    model, ids, found, default = zoo.build(name, torch.bfloat16), zoo.tokens(2, 9), [], []
    for form in ("eager", "grouped_mm", "batched_mm", "detinfer"):
        if form == "detinfer":
            assert form in importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
        model.set_experts_implementation(form)
        with deterministic("batch"):
            found.append(bits.as_bytes(model(ids).logits))
        with torch.no_grad():
            default.append(bits.as_bytes(model(ids).logits))
    for policy in (Policy(uncovered="trust"), Policy(Guarantee("batch", "portable"))):
        with deterministic(policy):
            found.append(bits.as_bytes(model(ids).logits))
    assert len(set(found)) == 1
    assert set(default[:3]) != set(found)


def test_without_the_hook_a_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail closed: what the hooks replace would not run either."""
    model, ids = zoo.build("mixtral", torch.bfloat16), zoo.tokens(2, 9)
    monkeypatch.setattr("detinfer.policy.installed.Hooks", lambda: hooks.Hooks(()))
    for form in ("eager", "grouped_mm"):
        model.set_experts_implementation(form)
        with deterministic("batch"), pytest.raises(RefusedError, match=r"experts.* is refused in Mixtral|aten::"):
            model(ids)


def test_expert_parallelism_and_norms_of_experts_are_refused_by_name() -> None:
    model, ids = zoo.build("mixtral", torch.bfloat16), zoo.tokens(1, 4)
    experts = model.model.layers[0].mlp.experts
    for attribute, word in (("_is_expert_parallel", "adds over ranks"), ("has_post_expert_norm", "a norm after each")):
        setattr(experts, attribute, True)
        with deterministic("batch"), pytest.raises(RefusedError, match=f"MixtralExperts is refused: .*{word}"):
            model(ids)
        setattr(experts, attribute, False)


def test_a_module_imported_inside_gets_its_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and it loses it again; a module that fails to import stays what it was."""
    (tmp_path / "late_model.py").write_text("def place():\n    return 'own'\n")
    (tmp_path / "bad_model.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "late_model", raising=False)
    table = [
        hooks.Hook(module, "place", lambda own: lambda: f"not {own()}", ("late",), "a test")
        for module in ("late_model", "bad_model")
    ]
    put = hooks.Hooks(table)
    try:
        late = importlib.import_module("late_model")
        assert late.place() == "not own"
        with pytest.raises(ZeroDivisionError):
            importlib.import_module("bad_model")
    finally:
        put.remove()
    assert late.place() == "own"
    assert put not in sys.meta_path


def test_a_mask_copies_no_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a mask attention is given K and V as the cache holds them; with the copies the bytes are the same."""
    model, ids = zoo.build("llama", torch.bfloat16), zoo.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    heads: list[tuple[int, int]] = []

    def seen(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if op == "aten::scaled_dot_product_attention":
            heads.append((args[0].shape[1], args[1].shape[1]))

    def run() -> bytes:
        heads.clear()
        with deterministic("batch", on_call=seen):
            return bits.as_bytes(model(ids, attention_mask=mask).logits[:, 3:])

    found = run()
    assert heads == [(4, 2), (4, 2)]
    table = [hook for hook in hooks.HOOKS if hook.attribute != "use_gqa_in_sdpa"]
    monkeypatch.setattr("detinfer.policy.installed.Hooks", lambda: hooks.Hooks(table))
    assert run() == found
    assert heads == [(4, 4), (4, 4)], "without the hook they are copied"


def test_keys_of_other_requests_are_hidden_in_a_packed_batch() -> None:
    """Two requests, one of them a piece after five keys: what transformers hides by the least number has no place left."""
    library = importlib.import_module("transformers.generation.continuous_batching.input_outputs")
    least, before = torch.finfo(torch.bfloat16).min, library.build_attention_mask

    def built() -> torch.Tensor:
        mask = torch.full((1, 1, 8, 16), least, dtype=torch.bfloat16)
        library.build_attention_mask(
            attention_mask=mask, cumulative_seqlens_q=[0, 3, 4], cumulative_seqlens_k=[0, 8, 12], sliding_window=1
        )
        return mask[0, 0]

    plain = built()
    with deterministic("batch"):
        ours = built()
    assert library.build_attention_mask is before
    own = torch.zeros(8, 16, dtype=torch.bool)
    for row, keys in enumerate((range(6), range(7), range(8), range(8, 12))):
        own[row, list(keys)] = True
    assert bits.as_bytes(plain == 0) == bits.as_bytes(own)
    assert bits.as_bytes(plain[~own]) == bits.as_bytes(torch.full_like(plain[~own], least))
    assert bits.as_bytes(ours[:4] == 0) == bits.as_bytes(own[:4]) and bool(ours[:4][~own[:4]].isneginf().all())
    assert bits.as_bytes(ours[4:]) == bits.as_bytes(plain[4:]), "rows that are nobody's still see something"
