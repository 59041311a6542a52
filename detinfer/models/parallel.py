"""Tensor-parallel layers: columns and rows of a weight spread over ranks, and what joins them again.

Any number of ranks will do: rank r of N holds ``start(r) .. start(r + 1)`` with ``start(r) = r * total // N``, so
shares differ by one at most and nothing is padded but the vocabulary. Each layer is a module without children, and so
a unit of its own in a golden: a rank's product and the sum over ranks are told apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from detinfer.models.partial import PartialSum
from detinfer.models.ranks import Ranks


def share(total: int, ranks: Ranks) -> slice:
    """What this rank holds of ``total`` columns, rows or heads."""
    return slice(ranks.rank * total // ranks.size, (ranks.rank + 1) * total // ranks.size)


class Product(nn.Module):
    """x [..., K] times weight [N, K]: rounded to the dtype, or ``unrounded`` in fp32."""

    def __init__(self, weight: torch.Tensor, unrounded: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.unrounded = unrounded

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{columns} -> {rows}{', unrounded' if self.unrounded else ''}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.unrounded:  # widening is exact, so this is the same chain without its last rounding
            return F.linear(x.float(), self.weight.float())
        return F.linear(x, self.weight)


class ColumnParallel(Product):
    """Some of the outputs of x times weight: ``part`` says which rows of the whole weight."""

    def __init__(self, whole: torch.Tensor, part: slice, dtype: torch.dtype) -> None:
        super().__init__(whole[part].to(dtype))


class RowParallel(Product):
    """The part of x times weight that ``part``, columns of the whole weight, adds; ``AllReduce`` makes it whole."""

    def __init__(self, whole: torch.Tensor, part: slice, dtype: torch.dtype, unrounded: bool = False) -> None:
        super().__init__(whole[:, part].to(dtype), unrounded)


class AllReduce(nn.Module):
    """The sum over ranks, in rank order: the same bytes on every rank."""

    def __init__(self, ranks: Ranks, name: str) -> None:
        super().__init__()
        self._ranks, self._name = ranks, name

    def extra_repr(self) -> str:
        return f"{self._ranks.size} ranks"

    @property
    def ranks(self) -> Ranks:
        """The ranks that it adds over."""
        return self._ranks

    @property
    def layer(self) -> str:
        """The layer whose sum it is."""
        return self._name.removesuffix(".all_reduce")

    def forward(self, partial: torch.Tensor | PartialSum) -> torch.Tensor:
        if isinstance(partial, PartialSum):
            partial = partial.take(self._name)
        return self._ranks.all_reduce(partial, self._name)

    def results(self, partial: torch.Tensor, reduce_results: bool) -> torch.Tensor | PartialSum:
        """The sum over ranks, or the part of it typed as a part, for a layer communicator to add."""
        if not reduce_results:
            return PartialSum(partial, self.layer)
        joined: torch.Tensor = self(partial)
        return joined


class Head(nn.Module):
    """Logits of the whole vocabulary from a share of it on every rank.

    The vocabulary is padded to a multiple of the ranks, because gathered parts have one size; the padding is cut off.
    """

    def __init__(self, whole: torch.Tensor, ranks: Ranks, dtype: torch.dtype) -> None:
        super().__init__()
        self._ranks = ranks
        self.vocabulary = whole.shape[0]
        rows = -(-self.vocabulary // ranks.size)
        padded = F.pad(whole, (0, 0, 0, rows * ranks.size - self.vocabulary))
        mine = padded[ranks.rank * rows : (ranks.rank + 1) * rows]
        self.weight = nn.Parameter(mine.to(dtype).contiguous(), requires_grad=False)

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[1]} -> {self.vocabulary}, {self.weight.shape[0]} on each of {self._ranks.size} ranks"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ranks.all_gather(F.linear(x, self.weight))[..., : self.vocabulary]
