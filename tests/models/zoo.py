"""The model zoo: a small transformers model of every architecture that is tested, weights from integers."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

VOCABULARY = 97
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = {"num_experts_per_tok": 3, "intermediate_size": 40}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", DECODER | {"intermediate_size": 88}),
    "qwen3": ("Qwen3Config", DECODER | {"intermediate_size": 88, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", DECODER | SLIDING | {"intermediate_size": 88, "head_dim": 16}),
    "mixtral": ("MixtralConfig", DECODER | EXPERTS | {"num_local_experts": 6}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        DECODER | EXPERTS | {"num_experts": 8, "moe_intermediate_size": 40, "head_dim": 16, "norm_topk_prob": True},
    ),
    "gpt_oss": (
        "GptOssConfig",
        DECODER | EXPERTS | SLIDING | {"num_local_experts": 6, "head_dim": 16, "rope_parameters": ROPE},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        DECODER
        | EXPERTS
        | {
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_local_experts": 8,
            "moe_intermediate_size": 40,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "olmoe": ("OlmoeConfig", DECODER | EXPERTS | {"num_experts": 6}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        DECODER | EXPERTS | {"num_experts": 6, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56},
    ),
    "gemma2": ("Gemma2Config", DECODER | {"intermediate_size": 88, "head_dim": 16, "sliding_window": 8}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bert": (
        "BertConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 88,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
    ),
}
"""Name: class of the configuration, and its values."""

DECODERS = tuple(name for name in CONFIGS if name != "bert")
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def draw(seed: int, *shape: int) -> torch.Tensor:
    """fp32 of both signs, exponents spread over eight powers of two, at most 1."""
    rng = np.random.default_rng(seed)
    mantissa = rng.integers(-127, 128, shape) / 128
    return torch.from_numpy(np.ldexp(mantissa, rng.integers(-7, 1, shape))).float()


def build(name: str, dtype: torch.dtype, **changes: Any) -> Any:
    """The model, in evaluation mode; every parameter and the routers' correction drawn anew from its name's place."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    kind, values = CONFIGS[name]
    config = getattr(transformers, kind)(**values | changes)
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for number, (place, parameter) in enumerate(model.named_parameters()):
            scale = 0.5 if parameter.dim() > 1 else 0.25
            parameter.copy_(draw(number, *parameter.shape) * scale + ("norm" in place and "bias" not in place))
        for place, buffer in model.named_buffers():
            if place.endswith("e_score_correction_bias"):
                buffer.copy_(draw(999, *buffer.shape) / 8)
    return model


def tokens(*shape: int, seed: int = 5) -> torch.Tensor:
    """Token ids, none of them a special one."""
    return torch.from_numpy(np.random.default_rng(seed).integers(3, VOCABULARY, shape))
