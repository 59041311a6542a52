"""The ranks that one model is spread over, as its layers see them."""

from __future__ import annotations

import torch


class Ranks:
    """One process: rank 0 of 1. Sums over ranks and gathering are then copies, which keep every byte."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The sum of every rank's ``x`` in rank order, rounded once to its dtype; ``name`` is the caller's, for reports."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x``, one after the other along the last dimension."""
        return x


ALONE = Ranks()
"""A model that one process holds whole."""
