"""What tests of scope tp share: ranks of one process, the tree written out, and inputs on which its order shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from detinfer.models.ranks import Ranks


class Together(Ranks):
    """Ranks of one process: each hands in its part, the last to come joins them with the tree, written out."""

    def __init__(self, rank: int, size: int, parts: list[Tensor]) -> None:
        super().__init__()
        self.rank, self.size, self._parts = rank, size, parts

    def all_reduce(self, x: Tensor, name: str, order: Any = "rank_order") -> Tensor:
        assert order == "rank_tree"
        self._parts.append(x)
        return x

    def share(self, value: Any, first: bool = False) -> list[Any]:
        return [value] * self.size


def joined(parts: list[Tensor]) -> Tensor:
    """rank_tree, written out: neighbours, then the odd last one."""
    values = [part.numpy() for part in parts]
    while len(values) > 1:
        values = [
            np.add(values[i], values[i + 1]) if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)
        ]
    return torch.from_numpy(values[0])


def cancelling(terms: int, outputs: int, count: int) -> tuple[Tensor, Tensor]:
    """x [3, terms] and weights [outputs, terms]: small terms, with a large one in the first group and its negative in
    the last, so that what is left depends on where they meet."""
    rng = np.random.default_rng(terms)
    x = torch.from_numpy(rng.integers(64, 128, (3, terms)) / 128).float()
    weight = torch.from_numpy(rng.integers(-127, 128, (outputs, terms)) / 1024).float()
    group = terms // count
    x[:, group - 1] = x[:, terms - 1] = 1.0
    weight[:, group - 1], weight[:, terms - 1] = 4096.0, -4096.0
    return x, weight


def reference(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """Each group one chain of fused steps, k ascending; then the tree. fp32 [rows, outputs]."""
    parts, size = [], x.shape[1] // count
    for start in range(0, x.shape[1], size):
        chain = np.zeros((x.shape[0], weight.shape[0]))
        for k in range(start, start + size):  # product and sum are exact in fp64 here
            chain = (chain + x[:, k, None].double().numpy() * weight[:, k].double().numpy()).astype(np.float32)
        parts.append(torch.from_numpy(chain.astype(np.float32)))
    return joined(parts)
