"""Rotated order: a token's experts are added starting with another one at every second place of the batch."""

import sys

import torch

from detinfer import cli
from detinfer.models.moe import Experts


def forward(self, x, weights, experts, shared):
    tokens, k = x.flatten(0, -2), weights.shape[-1]
    chosen, share = experts.flatten(0, -2), weights.flatten(0, -2)[..., None]
    outputs = torch.empty((k, *tokens.shape), dtype=torch.float32)
    for expert in range(len(self.gate)):
        token, place = torch.nonzero(chosen == expert, as_tuple=True)
        if len(token):
            outputs[place, token] = self._expert(expert, tokens[token])
    terms = [share[:, rank] * outputs[rank] for rank in range(k)] + [shared.flatten(0, -2)]
    ahead = turned = terms[0]
    for term in terms[1:]:
        ahead = ahead + term
    turned = terms[-1]
    for term in terms[:-1]:
        turned = turned + term
    odd = (torch.arange(len(tokens)) % 2 == 1)[:, None] if len(x) > 1 else torch.zeros(len(tokens), 1, dtype=torch.bool)
    return torch.where(odd, turned, ahead).to(x.dtype).view(x.shape)


Experts.forward = forward
sys.exit(cli.run())
