"""The policy on detinfer's own families: signatures, forms, and a small transformers model, row by row."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from detinfer import bits, ops
from detinfer.errors import RefusedError
from detinfer.policy import Accepted, Policy, Refused, deterministic, explain, families
from detinfer.policy.copies import CAST, COPIES
from detinfer.policy.overloads import forms
from detinfer.policy.refusals import DTYPES, EXAMPLES

COVERED = [(device, op) for device in ops.FAMILIES_ON for op in ops.covered(device)]


def schema(op: str) -> Any:
    """torch's schema of an operation."""
    base, _, overload = op.partition(".")
    return next(s for s in torch._C._jit_get_schemas_for_operator(base) if s.overload_name == overload)


@pytest.mark.parametrize(("device", "op"), COVERED)
def test_functions_take_what_torch_passes(device: str, op: str) -> None:
    """The dispatcher drops trailing defaults, and passes by name only what the schema says so."""
    arguments = schema(op).arguments
    signature = inspect.signature(ops.covered(device)[op].function)
    by_name = [a for a in arguments if a.kwarg_only]
    by_place = [a for a in arguments if not a.kwarg_only]
    signature.bind(*by_place, **{a.name: None for a in by_name})
    required = [a for a in by_place if not a.has_default_value()]
    signature.bind(*required, **{a.name: None for a in by_name if not a.has_default_value()})
    # The override looks at the dtypes of top-level tensors: a list of tensors would pass it by.
    assert not any("List[Tensor]" in str(a.type) or "Tensor[]" in str(a.type) for a in arguments)


def test_every_operation_has_one_home() -> None:
    """Nothing is covered and IEEE at once, and every family covers something."""
    assert set(ops.covered()).isdisjoint(ops.ieee_operations())
    assert {found.family for found in ops.covered().values()} == set(ops.FAMILIES)
    assert families.REDUCES.issubset(ops.covered())


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of both signs with spread exponents, from an integer generator."""
    generator = torch.Generator().manual_seed(seed)
    mantissa = torch.randint(128, 256, shape, generator=generator) / 128
    exponent = torch.randint(-5, 3, shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return torch.ldexp(mantissa * sign, exponent).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=bits.dtype_name)
@pytest.mark.parametrize("name", ["silu", "gelu", "sigmoid", "tanh", "exp", "log", "erf", "sin", "cos", "rsqrt"])
def test_in_place_and_out_forms_give_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    """All forms of one operation run on the same path."""
    x = numbers(3, 5, 77, dtype=dtype)
    op = f"aten::{name}"
    results = []
    with deterministic("batch") as active:
        for form in forms(op):
            base, _, overload = form.name.removeprefix("aten::").partition(".")
            function = getattr(getattr(torch.ops.aten, base), overload or "default")
            kwargs = {"out": torch.empty(0, dtype=dtype)} if form.form == "out" else {}
            results.append(function(x.clone(), **kwargs))
    assert len(results) == 3 if name != "gelu" else len(results) >= 2
    for result in results[1:]:
        assert bits.rows_equal(result, results[0]).all()
    assert {d.path for (o, _), d in active.decisions.items() if o.startswith(op)} == {"csrc/elementwise"}


def test_integers_pass_through_every_family() -> None:
    """Integer arithmetic runs on torch's own kernels, whose results are exact."""
    x = torch.arange(12).view(3, 4)
    with deterministic("batch"):
        assert (x @ x.t()).tolist() == [[14, 38, 62], [38, 126, 214], [62, 214, 366]]
        assert x.sum(-1).tolist() == [6, 22, 38]
        assert int(x.sum()) == 66
        assert (x * x + 1)[2].tolist() == [65, 82, 101, 122]
        assert x.pow(2)[1].tolist() == [16, 25, 36, 49]


def test_float64_is_refused_by_name() -> None:
    """There is no order for it on CPU."""
    x = torch.ones(3, 4, dtype=torch.float64)
    for uncovered in ("refuse", "trust"):
        with (
            deterministic("batch", uncovered=uncovered),
            pytest.raises(RefusedError, match=r"aten::(mm|matmul).*float64"),
        ):
            x @ x.t()


def test_explain_proves_every_operation_on_this_machine() -> None:
    """Every covered and IEEE operation is accepted in every dtype; copies are accepted; the rest says why not."""
    decisions = explain(Policy())
    refused = [d for d in decisions if isinstance(d, Refused)]
    assert {d.op for d in refused} == {op for op in EXAMPLES if op not in (*ops.covered(), *ops.ieee_operations())}
    accepted: dict[str, int] = {}
    for decision in decisions:
        if isinstance(decision, Accepted) and decision.proof is not None:
            accepted[decision.op] = accepted.get(decision.op, 0) + 1
            assert decision.proof.cases > 0
    computing = {form.name for op in (*ops.covered(), *ops.ieee_operations()) for form in forms(op)}
    assert set(accepted) == (computing - COPIES) | {CAST}
    assert set(accepted.values()) == {len(DTYPES)}


PROMPT, STEPS, BATCHES = 7, 3, range(1, 10)


@pytest.fixture(scope="module", params=DTYPES, ids=bits.dtype_name)
def llama(request: pytest.FixtureRequest) -> Any:
    """A Llama of two layers with odd widths, all weights from an integer generator."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        hidden_size=90,
        intermediate_size=77,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=101,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(request.param)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(seed, *parameter.shape))
            if parameter.dim() > 1:
                parameter.mul_(0.125)
        # Random rows hide an order in 16 bits. The first layer's values are sums that cancel: the first and the last
        # input are equal, and their weights are large and opposite.
        first = model.model.layers[0]
        model.model.embed_tokens.weight[:, -1] = model.model.embed_tokens.weight[:, 0]
        first.input_layernorm.weight[-1] = first.input_layernorm.weight[0]
        first.self_attn.v_proj.weight[:, 0] = 2.0**15
        first.self_attn.v_proj.weight[:, -1] = -(2.0**15)
    return model


def run(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Logits of the prefill of the first tokens, then of one decode step for each of the others."""
    results, cache = [], None
    for start in (0, *range(PROMPT, tokens.shape[1])):
        stop = PROMPT if start == 0 else start + 1
        out = model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        results.append(out.logits)
    return results


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_llama_rows_do_not_depend_on_the_batch(llama: Any, mode: Any) -> None:
    """Every row of logits at batch 1 to 9, prefill and decode with its cache, has the bytes of the row alone.

    The check can fail: with one projection computed over reversed operands whenever the batch exceeds 1, rows differ.
    """
    tokens = torch.randint(0, 101, (9, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    layer = llama.model.layers[0].self_attn.v_proj

    def reversed_order(module: Any, args: Any, output: Any) -> Any:
        (x,) = args
        return output if x.shape[0] == 1 else torch.nn.functional.linear(x.flip(-1), module.weight.flip(-1))

    with mode(), deterministic("batch") as active:
        alone = [run(llama, tokens[i : i + 1]) for i in range(9)]
        together = run(llama, tokens)
    with mode(), deterministic("batch", uncovered="trust"):
        for batch in BATCHES:
            rows = [(i * 5 + batch) % 9 for i in range(batch)]
            for step, logits in enumerate(run(llama, tokens[rows])):
                expected = torch.cat([alone[i][step] for i in rows])
                assert bits.rows_equal(logits, expected).all(), f"batch {batch}, step {step}"
        handle = layer.register_forward_hook(reversed_order)
        try:
            planted = run(llama, tokens)
        finally:
            handle.remove()
    seen = [bits.rows_equal(p, t).all() for p, t in zip(planted, together, strict=True)]
    assert not all(seen), "the planted order was not seen: this test could not have failed"
    assert not bits.rows_equal(alone[0][0], alone[1][0]).all()

    assert all(isinstance(d, Accepted) for d in active.decisions.values())
    assert {d.path for d in active.decisions.values()} == {"torch", *(f"csrc/{f}" for f in ops.FAMILIES if f != "moe")}
    reducing = {op for op, *_ in active.reducing_calls()}
    assert {"aten::linear", "aten::scaled_dot_product_attention", "aten::mean.dim"} <= reducing
    assert "aten::silu" in active.order_free()


def test_llama_prefill_in_pieces(llama: Any) -> None:
    """How a sequence is cut into prefill and decode does not change the bytes of any position."""
    tokens = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(), deterministic("batch"):
        whole = llama(tokens, use_cache=False).logits
        for cut in (1, 5, 11):
            first = llama(tokens[:, :cut], use_cache=True)
            second = llama(tokens[:, cut:], past_key_values=first.past_key_values, use_cache=True)
            pieces = torch.cat([first.logits, second.logits], 1)
            assert bits.rows_equal(pieces, whole).all(), f"cut at {cut}"
