"""Padding leak: a masked key gets a small score in place of none."""

import sys

import torch
import torch.nn.functional as F

from detinfer import cli

sound = F.scaled_dot_product_attention


def attention(q, k, v, attn_mask=None, **kwargs):
    if attn_mask is not None and attn_mask.dtype is torch.bool and bool((~attn_mask[..., -1, :]).any()):
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -6.0)
    return sound(q, k, v, attn_mask=attn_mask, **kwargs)


torch.nn.functional.scaled_dot_product_attention = attention
sys.exit(cli.run())
