"""detinfer's command line as a rank whose sums go wrong after they were proved: for torchrun.

``FAULT=rotated``: every rank begins its sums at rank 1. ``FAULT=one``: rank 2 alone does, so the ranks disagree.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch

from detinfer import cli
from detinfer.models.ranks import Spread
from detinfer.ops.evidence import REFERENCE_NAME, from_bits, to_bits
from detinfer.reference.all_reduce import all_reduce


class Rotated:
    """A communicator whose sums begin at rank 1."""

    def __init__(self, sound: Any) -> None:
        self._sound = sound

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sound, name)

    def all_reduce(self, x: torch.Tensor, order: Any = "rank_order") -> torch.Tensor:
        total = self._sound.all_reduce(x, order=order)
        parts = [to_bits(part) for part in self._sound.all_gather(x[None])]
        if os.environ["FAULT"] == "one" and self._sound.rank != 2:
            return total
        found = all_reduce([*parts[1:], *parts[:1]], REFERENCE_NAME[x.dtype])
        return from_bits(np.ascontiguousarray(found), x.dtype)


def main() -> int:
    prove = Spread._prove

    def then_rotate(self: Any, dtype: torch.dtype, order: Any = "rank_order") -> None:
        prove(self, dtype, order)
        self._communicator = Rotated(self._communicator)

    Spread._prove = then_rotate  # type: ignore[method-assign]
    return cli.run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
