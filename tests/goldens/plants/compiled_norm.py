"""A compiled function whose RMSNorm adds its squares in halves, as fusion with what comes before does."""

import sys

import torch
from transformers.models.llama import modeling_llama

from detinfer import cli

sound = modeling_llama.LlamaRMSNorm.forward
compiled = []


def forward(self, x):
    if not compiled:
        return sound(self, x)
    squares = x.float().square()
    half = x.shape[-1] // 2
    mean = (squares[..., :half].sum(-1, keepdim=True) + squares[..., half:].sum(-1, keepdim=True)) / x.shape[-1]
    return self.weight * (x.float() * torch.rsqrt(mean + self.variance_epsilon)).to(x.dtype)


def compile_(function, *_, **__):
    def call(*given):
        compiled.append(function)
        try:
            return function(*given)
        finally:
            compiled.clear()

    return call


modeling_llama.LlamaRMSNorm.forward = forward
torch.compile = compile_
sys.exit(cli.run())
