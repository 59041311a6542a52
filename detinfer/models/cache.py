"""A KV cache: for each layer, the keys and values of all positions so far."""

from __future__ import annotations

import torch


class KVCache:
    """``layers[index]`` are the keys and values of a layer, each [B, heads, length, width]; absent before its first call.

    Under tensor parallelism the heads are those that the rank needs.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Positions held, the same for every layer between two steps."""
        return next((keys.shape[2] for keys, _ in self.layers.values()), 0)

    def update(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, S, width] to layer ``index``; returns all that it holds then."""
        if (held := self.layers.get(index)) is not None:
            keys, values = torch.cat((held[0], keys), 2), torch.cat((held[1], values), 2)
        self.layers[index] = keys, values
        return keys, values
