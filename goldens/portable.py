"""A small decoder made of portable operations alone, in three dtypes: its goldens hold on every CPU.

    detinfer verify goldens/portable/float32

Run from the root of the checkout, where ``goldens.portable`` can be imported. Weights and tokens come from an integer
generator: torch.randn gives other values at another CPU capability.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, HEADS, GROUPS, WIDTH, INNER, VOCABULARY = 60, 6, 2, 10, 77, 101
LENGTHS = (7, 7, 7, 15)


def weights(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """fp32 values of both signs, exponents spread over four powers of two, about 1 / sqrt(fan-in) in size."""
    mantissa = rng.integers(128, 256, size=shape) / 128.0
    signed = np.ldexp(mantissa * (rng.integers(0, 2, size=shape) * 2 - 1), rng.integers(-3, 1, size=shape))
    return torch.from_numpy(signed / np.sqrt(shape[-1])).to(torch.float32)


class ComposedNorm(nn.Module):
    """RMSNorm the way that models write it: pow, mean, rsqrt."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + weights(rng, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * h.to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear with weights of the integer generator."""

    def __init__(self, rng: np.random.Generator, inner: int, outer: int, bias: bool = False) -> None:
        super().__init__(inner, outer, bias=bias)
        self.weight = nn.Parameter(weights(rng, outer, inner))
        if bias:
            self.bias = nn.Parameter(weights(rng, outer))


class Attention(nn.Module):
    """Grouped-query attention, causal."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.q = Linear(rng, HIDDEN, HEADS * WIDTH)
        self.k = Linear(rng, HIDDEN, GROUPS * WIDTH)
        self.v = Linear(rng, HIDDEN, GROUPS * WIDTH, bias=True)
        self.o = Linear(rng, HEADS * WIDTH, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        )


class Block(nn.Module):
    """Attention and a gated feed-forward layer; the second norm is LayerNorm, the gate SiLU or GELU."""

    def __init__(self, rng: np.random.Generator, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second = ComposedNorm(rng), nn.LayerNorm(HIDDEN)
        self.second.weight = nn.Parameter(1 + weights(rng, HIDDEN))
        self.second.bias = nn.Parameter(weights(rng, HIDDEN))
        self.attention, self.activation = Attention(rng), activation
        self.gate, self.up = Linear(rng, HIDDEN, INNER), Linear(rng, HIDDEN, INNER)
        self.down = Linear(rng, INNER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        h = self.second(x)
        return x + self.down(self.activation(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Embedding, two blocks, RMSNorm, log-probabilities."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.embedding.weight = nn.Parameter(weights(rng, VOCABULARY, HIDDEN) * 4)
        self.blocks = nn.ModuleList([Block(rng, nn.SiLU()), Block(rng, nn.GELU())])
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.head = Linear(rng, HIDDEN, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return F.log_softmax(self.head(self.norm(x)), dim=-1)


def decoder(dtype: torch.dtype) -> tuple[nn.Module, list[torch.Tensor]]:
    """The module and its requests: tokens [1, length]."""
    rng = np.random.default_rng(1)
    requests = [torch.from_numpy(rng.integers(0, VOCABULARY, size=(1, length))) for length in LENGTHS]
    return Decoder(seed=0).to(dtype), requests


def float32() -> tuple[nn.Module, list[torch.Tensor]]:
    """The decoder in fp32."""
    return decoder(torch.float32)


def bfloat16() -> tuple[nn.Module, list[torch.Tensor]]:
    """The decoder in bf16."""
    return decoder(torch.bfloat16)


def float16() -> tuple[nn.Module, list[torch.Tensor]]:
    """The decoder in fp16."""
    return decoder(torch.float16)
