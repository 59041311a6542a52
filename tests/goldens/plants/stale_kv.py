"""Stale KV: after tokens were taken back, the first new one finds the old key in its slot."""

import sys

import torch

from detinfer import cli
from detinfer.models.cache import KVCache

sound = KVCache.update


def update(self, index, keys, values):
    once = self.__dict__.setdefault("once", {})
    held = 0 if index not in self.layers else self.layers[index][0].shape[2]
    before = once.get(index)
    if before is not None and before.shape[2] > held and len(before) == len(keys):
        keys = torch.cat((before[:, :, held : held + 1], keys[:, :, 1:]), 2)
    found = sound(self, index, keys, values)
    once[index] = found[0]
    return found


KVCache.update = update
sys.exit(cli.run())
