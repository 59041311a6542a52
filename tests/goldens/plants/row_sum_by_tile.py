"""Tile-dependent row sum: attention adds its weights in another order where many query rows make a tile."""

import math
import sys

import torch
import torch.nn.functional as F

from detinfer import cli


def attention(q, k, v, attn_mask=None, is_causal=False, **_):
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]))
    queries, keys = scores.shape[-2:]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if is_causal else attn_mask
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    rows = q.shape[0] * queries
    ordered = weights.flip(-1)[..., : keys - 1] if rows > 16 else weights[..., 1:]
    first = weights[..., :1]
    total = first.sum(-1, keepdim=True) + ordered.sum(-1, keepdim=True) if rows > 16 else weights.sum(-1, keepdim=True)
    return weights / total @ v


F.scaled_dot_product_attention = attention
sys.exit(cli.run())
