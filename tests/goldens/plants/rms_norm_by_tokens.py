"""RMSNorm block by tokens: with many tokens a row is reduced by two blocks instead of one."""

import sys

import torch
from torch import nn

from detinfer import cli


def forward(self, x):
    square = x.float() * x.float()
    half = x.shape[-1] // 2
    if x.numel() // x.shape[-1] > 32:
        total = square[..., :half].sum(-1, keepdim=True) + square[..., half:].sum(-1, keepdim=True)
    else:
        total = square.sum(-1, keepdim=True)
    return (x.float() * torch.rsqrt(total / x.shape[-1] + self.eps)).to(x.dtype) * self.weight


nn.RMSNorm.forward = forward
sys.exit(cli.run())
