"""Atomics: the parts of a down projection are added in the order in which they happen to be done."""

import itertools
import random
import sys

import torch.nn.functional as F

from detinfer import cli
from detinfer.models.parallel import RowParallel

chance = random.Random()


def forward(self, x):
    cuts = [x.shape[-1] * i // 8 for i in range(9)]
    parts = [F.linear(x[..., a:b], self.weight[:, a:b]) for a, b in itertools.pairwise(cuts)]
    if len(x) > 1:
        chance.shuffle(parts)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


RowParallel.forward = forward
sys.exit(cli.run())
