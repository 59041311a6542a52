"""Which part of a tensor belongs to one request, in a run alone and in a run with others.

Nothing is told about the tensors of the operations inside a model, so the parts are found from sizes: a dimension that
is as long as the batch, the tokens or the keys of a run holds them. The run alone is given a number of tokens that is
no other size in play, so that no dimension fits by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """Where consecutive positions of one request lie in a batch's call: row ``row``, tokens ``at`` and after.

    ``gap`` keys of the row stand before the request's own; of those, the first ``keys`` are its first positions (None:
    all). ``alone`` is the first of the ``count`` positions in the run alone.
    """

    row: int
    at: int
    alone: int
    count: int
    gap: int = 0
    keys: int | None = None


@dataclass(frozen=True)
class Sizes:
    """Of one call: rows of its batch, tokens of each, keys that they see."""

    batch: int
    tokens: int
    keys: int


Place = tuple[slice, ...]
"""Which elements of a tensor: a slice for each dimension."""
Pair = tuple[Place, Place]
"""The same elements in the run alone and in the other."""


def rows_of_batch(alone: torch.Tensor, other: torch.Tensor, batch: int, row: int) -> Pair | None:
    """The same request's part of the same tensor at batch 1 and at ``batch``; None where sizes do not fit."""
    if alone.dim() != other.dim() or alone.dtype != other.dtype:
        return None
    whole = [slice(0, size) for size in alone.shape]
    wider = [i for i, (a, b) in enumerate(zip(alone.shape, other.shape, strict=True)) if a != b]
    if not wider:
        return tuple(whole), tuple(whole)
    if len(wider) > 1 or other.shape[wider[0]] != batch * alone.shape[wider[0]]:
        return None
    length = alone.shape[wider[0]]
    part = list(whole)
    part[wider[0]] = slice(row * length, (row + 1) * length)
    return tuple(whole), tuple(part)


def rows_of_span(alone: torch.Tensor, other: torch.Tensor, one: Sizes, many: Sizes, span: Span) -> Pair | None:
    """The span's part of a tensor in the run alone of ``one.tokens`` tokens and in a call of sizes ``many``."""
    if alone.dim() != other.dim() or alone.dtype != other.dtype:
        return None
    left, right = [], []
    batched, placed = many.batch == 1, False
    for a, b in zip(alone.shape, other.shape, strict=True):
        positions = slice(span.alone, span.alone + span.count)
        if a == one.tokens and b == many.batch * many.tokens and not batched and not placed:
            start = span.row * many.tokens + span.at
            left.append(positions)
            right.append(slice(start, start + span.count))
            batched = placed = True
        elif a == 1 and b == many.batch and not batched:
            left.append(slice(0, 1))
            right.append(slice(span.row, span.row + 1))
            batched = True
        elif a == one.tokens and b == many.tokens and not placed:
            left.append(positions)
            right.append(slice(span.at, span.at + span.count))
            placed = True
        elif a == one.tokens and b in (many.keys, many.tokens):
            seen = min(span.alone + span.count, b - span.gap)
            seen = seen if span.keys is None else min(seen, span.keys)
            left.append(slice(0, seen))
            right.append(slice(span.gap, span.gap + seen))
        elif a == b:
            left.append(slice(0, a))
            right.append(slice(0, a))
        else:
            return None
    return tuple(left), tuple(right)


def lonely(length: int, taken: Sequence[int]) -> int:
    """The least number of tokens from ``length`` on that is none of the sizes ``taken``, nor a product of two."""
    products = {a * b for a in taken for b in taken}
    return next(n for n in range(length, length + len(products) + len(taken) + 2) if n not in products | set(taken))


def shape(tensors: Sequence[torch.Tensor]) -> str:
    """``[1, 16, 64] x [64, 64]`` of an operation's tensors."""
    return " x ".join(str(list(t.shape)) for t in tensors) or "no tensor"
