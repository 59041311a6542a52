"""transformers' mixture-of-experts layers in the contract's order, put in the place of its own forms.

Its eager form adds experts into the result one by one in the dtype, grouped and batched ones sum over the experts of a
token in an order of their own, and all of them round each expert's output first. These functions take the same
arguments and the layers' own activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from detinfer.errors import RefusedError
from detinfer.ops import attention_sinks, moe
from detinfer.policy.direct import settle
from detinfer.policy.refusals import message


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts module of transformers on [tokens, hidden], [tokens, k] and [tokens, k]: rounded once.

    Raises RefusedError for expert parallelism, whose ranks add up what they have, and for a norm after each expert.
    """
    layer = layer_of(self)
    _settle_experts(hidden_states)
    return moe.experts(hidden_states, top_k_index, top_k_weights, layer)


def _settle_experts(x: torch.Tensor) -> None:
    """Elsewhere they are made of covered operations, each of which is decided by itself."""
    if moe.on_matrix_unit(x):
        from detinfer.ops import moe_cuda_proof

        settle("detinfer::experts", x, "cuda/moe", moe_cuda_proof.prove_experts, portable=False)


def layer_of(module: Any) -> moe.Experts:
    """The weights of an experts module, found by the attributes that transformers' interface gives it."""
    name = type(module).__name__
    if getattr(module, "_is_expert_parallel", False):
        raise RefusedError(message(name, "expert parallelism adds over ranks in an order that no proof covers"))
    if getattr(module, "has_post_expert_norm", False):
        raise RefusedError(message(name, "it has a norm after each expert, for which there is no contract"))
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return moe.Experts(
        up=getattr(module, up),
        down=module.down_proj,
        gate=module._apply_gate if module.has_gate else module.act_fn,
        up_bias=getattr(module, f"{up}_bias") if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        transposed=module.is_transposed,
    )


def shared_experts_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A layer with ``gate``, ``experts`` and ``shared_experts`` (DeepSeek-V3): the shared expert last, one rounding.

    Cut over ranks by transformers, experts and shared expert are each rounded and added over ranks before they meet.
    """
    _, weights, chosen = self.gate(hidden_states)
    x = hidden_states.view(-1, hidden_states.shape[-1])
    if hasattr(self.experts.down_proj, "to_local"):  # a rank's share, which the experts' own forward adds up
        both: torch.Tensor = self.experts(x, chosen, weights) + self.shared_experts(x)
        return both.view(hidden_states.shape)
    _settle_experts(x)
    mlp = self.shared_experts
    inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    shared = moe.unrounded(inner, mlp.down_proj.weight, mlp.down_proj.bias)
    return moe.experts(x, chosen, weights, layer_of(self.experts), shared).view(hidden_states.shape)


def sinks_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """gpt-oss's attention: query [B, H, Lq, D], keys and values of fewer heads, and the module's ``sinks`` [H].

    A masked key is one whose mask is the dtype's least number (transformers' eager mask) or -inf.
    """
    if dropout:
        raise RefusedError(message(type(module).__name__, f"dropout {dropout} draws random numbers; call model.eval()"))
    mask = attention_mask
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, float("-inf"))
    sinks: Any = module.sinks
    causal = mask is None and query.shape[2] > 1
    if query.is_cuda:
        from detinfer.ops import attention_cuda

        settle(attention_sinks.NAME, query, "cuda/attention", attention_sinks.prove_cuda, portable=False)
        out = attention_cuda.attention(query, key, value, causal=causal, mask=mask, sinks=sinks, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    settle(attention_sinks.NAME, query, "csrc/attention", attention_sinks.prove)
    out = attention_sinks.attention_with_sinks(query, key, value, sinks, mask, causal, scaling)
    return out.transpose(1, 2).contiguous(), None
