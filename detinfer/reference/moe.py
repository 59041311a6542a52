"""Mixture of experts: which experts a token takes, and how their outputs are joined, as explicit loops."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detinfer.reference.arithmetic import Float


def top_k(logits: Float, k: int, largest: bool = True) -> NDArray[Any]:
    """[tokens, experts] to int64 [tokens, k]: the greatest logits in descending order, equal ones by the lower index.

    The least in ascending order without ``largest``. NaN is greater than any number and equal to NaN; +0 equals -0.
    """
    found = np.zeros((len(logits), k), np.int64)
    for token, row in enumerate(logits):
        left = list(range(len(row)))
        for place in range(k):
            best = left[0]
            for expert in left[1:]:
                if _greater(row[expert], row[best]) if largest else _greater(row[best], row[expert]):
                    best = expert
            found[token, place] = best
            left.remove(best)
    return found


def _greater(a: Any, b: Any) -> bool:
    return bool(a > b) or bool(np.isnan(a) and not np.isnan(b))


def combine(weights: Float, outputs: Float, shared: Float | None) -> Float:
    """weights [tokens, k] and unrounded expert outputs [tokens, k, n], in order of top-k rank, to fp32 [tokens, n].

    acc = w_0 e_0; acc = acc + (w_1 e_1); ...; then the shared expert's output. Not yet rounded to the dtype.
    """
    with np.errstate(all="ignore"):
        acc: Float = weights[:, 0, None] * outputs[:, 0]
        for place in range(1, weights.shape[1]):
            acc = acc + weights[:, place, None] * outputs[:, place]
        return acc if shared is None else acc + shared
