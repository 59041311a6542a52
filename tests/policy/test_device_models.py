"""What models of transformers call is in the tables of every device: found on CPU, asked of what is known on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from detinfer import ops
from detinfer.policy import Accepted, Policy, Refused, deterministic
from detinfer.policy.decide import Known, decide
from detinfer.policy.families import own
from detinfer.policy.policy import Proof
from detinfer.policy.variants import ARANGE, WHOLE_STEPS

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
MORE: dict[str, dict[str, int]] = {
    "Llama": {},
    "Qwen3": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "Mixtral": {"num_local_experts": 4},
}


def gpu() -> Known:
    """The tables of a GPU, every proof taken as made: what is left is whether an operation stands in them."""

    def prove(op: str, dtype: torch.dtype) -> Proof:
        return Proof(f"{op} {dtype}", "nothing", 1, "00")

    there = replace(
        own(),
        covered=ops.covered("cuda"),
        ieee=ops.ieee_operations("cuda"),
        values=ops.value_operations("cuda"),
        prove=prove,
        device="cuda",
        elsewhere={},
    )
    return there.known


def use(made: Any) -> None:
    """Prefill and decode with a growing and a static cache, padding on the left, generate."""
    from transformers import StaticCache

    ids = torch.arange(24).view(3, 8) + 5
    cache = made(input_ids=ids, use_cache=True).past_key_values
    made(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    slots = StaticCache(config=made.config, max_cache_len=16)
    made(input_ids=ids, past_key_values=slots, use_cache=True)
    made(input_ids=ids[:, :1], past_key_values=slots, use_cache=True)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    made(input_ids=ids, attention_mask=mask, use_cache=True)
    made.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("kind", MORE)
def test_every_operation_stands_in_the_tables_of_a_gpu(kind: str) -> None:
    """The same calls, of the same dtypes, are accepted there once they are proved; one that nobody covers is not."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{kind}Config")(**SIZES, **MORE[kind])
    made = getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16().eval()
    with deterministic("batch") as active:
        use(made)
    known, policy = gpu(), Policy()
    found = {
        (op, dtypes): decide(policy, op, dtypes, known, variant=WHOLE_STEPS if op in ARANGE else "")
        for op, dtypes in active.decisions
        if op.startswith("aten::")
    }
    assert [key for key, decision in found.items() if not isinstance(decision, Accepted)] == []
    assert {"aten::linear", "aten::scaled_dot_product_attention", "aten::mean.dim"} <= {op for op, _ in found}
    assert isinstance(decide(policy, "aten::cumsum", (torch.bfloat16,), known), Refused)
