"""Weights of the built-in models from a seeded integer generator, made so that the order over ranks shows.

A sum of plain random numbers hides its order: most of the time it rounds to the same bits. Here the first and the
middle of the terms that a row-parallel layer adds are large, the last are their negative, and the rest is small beside
them: A + ... + A + ... - 2A. In rank order the sum passes through 2A and loses a bit there that it keeps in an order
that begins elsewhere. (A and -A alone would not do: small terms round to the same grid beside either of them.)
"""

from __future__ import annotations

import numpy as np
import torch

MOST_RANKS = 8
LARGE, SMALL = 2.0**11, 2.0**-4
"""Factors of the columns that cancel, and of the others."""


def draw(seed: int, name: str, *shape: int) -> torch.Tensor:
    """fp32 of both signs, exponents spread over four powers of two, about 1 / sqrt(the last dimension) in size.

    The same for a seed and a name on every machine: numpy's integers, exact divisions, one square root.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    mantissa = rng.integers(128, 256, size=shape) / 128.0
    signed = np.ldexp(mantissa * (rng.integers(0, 2, size=shape) * 2 - 1), rng.integers(-3, 1, size=shape))
    return torch.from_numpy(signed / np.sqrt(shape[-1])).to(torch.float32)


def large(width: int) -> tuple[slice, ...]:
    """The first, middle and last of ``width`` terms: as many each as rank 0 holds of them at ``MOST_RANKS``."""
    count = width // MOST_RANKS
    return slice(0, count), slice(width // 2, width // 2 + count), slice(width - count, width)


def repeating(weight: torch.Tensor, places: tuple[slice, ...]) -> torch.Tensor:
    """[..., N, K] with the same rows at all three places: equal terms in the sum that follows."""
    for place in places[1:]:
        weight[..., place, :] = weight[..., places[0], :]
    return weight


def cancelling(weight: torch.Tensor, places: tuple[slice, ...]) -> torch.Tensor:
    """[..., N, K] whose columns at the places are large, A, A and -2A, and small elsewhere."""
    ends = weight[..., places[0]] * LARGE
    weight *= SMALL
    for place, factor in zip(places, (1, 1, -2), strict=True):
        weight[..., place] = ends * factor
    return weight
