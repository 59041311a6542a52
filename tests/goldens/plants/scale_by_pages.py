"""Attention over pages: the kernel that reads them scales by a factor one unit in the last place larger."""

import sys

import torch.nn.functional as F
from transformers.models.llama import modeling_llama

from detinfer import cli

sound = F.scaled_dot_product_attention
forward = modeling_llama.LlamaAttention.forward
paged = []


def attention(query, key, value, *, scale=None, **more):
    return sound(query, key, value, scale=scale * (1 + 2**-22) if paged else scale, **more)


def told(self, *given, **more):
    if "cu_seq_lens_q" in more:
        paged.append(self)
    try:
        return forward(self, *given, **more)
    finally:
        paged.clear()


F.scaled_dot_product_attention = attention
modeling_llama.LlamaAttention.forward = told
sys.exit(cli.run())
