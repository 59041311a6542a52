"""What each operation of the matmul family multiplies: the same for every device, and no arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

BATCH_DIMS = 6
"""Leading dimensions that a kernel walks itself; where there are more they are joined."""


class Views(NamedTuple):
    """What an operation multiplies: a [*batch, M, K], b [*batch, K, N], c None or [*batch, M, N] broadcast by strides
    of 0; ``shape`` is the shape of the contiguous result, M * N elements for each of the batch."""

    shape: tuple[int, ...]
    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor | None


def _batched(dims: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Views]:
    """Operands of exactly ``dims`` dimensions, c broadcast to the result."""

    def views(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None) -> Views:
        if a.dim() != dims or b.dim() != dims:
            raise ValueError(f"both must have {dims} dimensions")
        shape = (*a.shape[:-1], b.shape[-1])
        return Views(shape, a, b, None if c is None else c.expand(shape))

    return views


two, three = _batched(2), _batched(3)


def linear_views(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Views:
    if weight.dim() not in (1, 2) or (weight.dim() == 1 and bias is not None):
        raise ValueError("the weight must be [N, K], or [K] without a bias")
    if x.dim() == 0:
        raise ValueError("the input must have a dimension")
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    b = weight.t() if weight.dim() == 2 else weight[:, None]
    shape = (*x.shape[:-1], *weight.shape[:-1])
    return Views(shape, rows, b, None if bias is None else bias.expand(rows.shape[0], b.shape[1]))


def vector_views(a: torch.Tensor, x: torch.Tensor, c: torch.Tensor | None) -> Views:
    if a.dim() != 2 or x.dim() != 1:
        raise ValueError("they must have 2 and 1 dimensions")
    return Views(a.shape[:1], a, x[:, None], None if c is None else c.expand(a.shape[:1])[:, None])


def dot_views(x: torch.Tensor, y: torch.Tensor, _: torch.Tensor | None) -> Views:
    if x.dim() != 1 or y.dim() != 1:
        raise ValueError("both must have 1 dimension")
    return Views((), x[None], y[:, None], None)


def matmul_views(a: torch.Tensor, b: torch.Tensor, _: torch.Tensor | None) -> Views:
    if a.dim() == 0 or b.dim() == 0:
        raise ValueError("both must have a dimension")
    left = a[None] if a.dim() == 1 else a
    right = b[:, None] if b.dim() == 1 else b
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    shape = (*batch, *left.shape[-2 : -1 if a.dim() > 1 else -2], *right.shape[-1 : None if b.dim() > 1 else -1])
    if right.dim() == 2 and left.numel():  # one weight for all: leading dimensions are rows
        return Views(shape, left.reshape(-1, left.shape[-1]), right, None)
    left, right = left.expand(*batch, -1, -1), right.expand(*batch, -1, -1)
    if len(batch) > BATCH_DIMS:
        left, right = left.flatten(0, -3), right.flatten(0, -3)
    return Views(shape, left, right, None)
