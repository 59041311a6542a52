"""Top-k tie: equal router logits go to the lower expert for few tokens, to the higher one for many."""

import sys

import torch

from detinfer import cli
from detinfer.models.moe import TopK

sound = TopK.forward


def forward(self, logits):
    logits = torch.round(logits * 2) / 2  # so that there are ties
    if logits.numel() // logits.shape[-1] <= 16:
        return sound(self, logits)
    weights, experts = sound(self, logits.flip(-1))
    return weights, logits.shape[-1] - 1 - experts


TopK.forward = forward
sys.exit(cli.run())
