"""N ranks on one GPU in this process, a stream each, and tensors by their stored bits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # a hardware queue for each stream; read when CUDA starts

import numpy as np
import torch

from detinfer.collectives.cuda import CudaCommunicator, connect_here
from detinfer.collectives.cuda_native import Geometry

SMALL = Geometry(
    push_channels=16,
    push_bytes=16384,
    push_threads=256,
    tile_channels=6,
    tile_bytes=2048,
    part_bytes=8192,
    least_tile_bytes=512,
    overlap=True,
)
"""Few blocks, so that eight ranks fit on one GPU together, and small tiles, so that rings go round."""


def tensor_of(bits: Any, dtype: str, layout: str = "dense") -> torch.Tensor:
    """The GPU tensor of these stored bits; ``offset``: it starts one element into another."""
    bits = np.ascontiguousarray(bits)
    flat = torch.from_numpy(bits.copy().reshape(-1).view(np.uint8)).cuda().view(getattr(torch, dtype))
    if layout == "offset":
        room = torch.empty(flat.numel() + 1, dtype=flat.dtype, device="cuda")
        room[1:] = flat
        flat = room[1:]
    return flat.reshape(bits.shape)


def bits_of(tensor: torch.Tensor, like: Any) -> Any:
    """The stored bits of a tensor as an array of the type of ``like``."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return flat.view(like.dtype).reshape(tensor.shape)


def same(tensor: torch.Tensor, expected: Any) -> bool:
    """Whether the tensor's bytes are those of the array."""
    found = bits_of(tensor, expected)
    return found.shape == expected.shape and found.tobytes() == expected.tobytes()


class Here:
    """Ranks 0 to ``size`` - 1 on the current GPU."""

    def __init__(self, size: int, **options: Any) -> None:
        options = {"geometry": SMALL, "timeout": 20.0, **options}
        self.size = size
        self.ranks: list[CudaCommunicator] = connect_here(size, 0, **options)
        self.streams = [torch.cuda.Stream() for _ in range(size)]

    def run(self, *calls: Callable[[CudaCommunicator], Any]) -> list[list[Any]]:
        """Each call on every rank, one after the other; [call][rank]. The calls must allocate nothing that could wait."""
        torch.cuda.synchronize()
        found = []
        for call in calls:
            results = []
            for rank, stream in zip(self.ranks, self.streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(call(rank))
            found.append(results)
        torch.cuda.synchronize()
        for rank in self.ranks:
            rank.check()
        return found

    def all_reduce(
        self, parts: Sequence[torch.Tensor], path: str, in_place: bool = False, **options: Any
    ) -> list[torch.Tensor]:
        """What each rank gets by ``path``."""
        given = [part.clone() for part in parts] if in_place else parts
        out = given if in_place else [torch.full_like(part, -3) for part in parts]
        self.run(lambda c: c.all_reduce(given[c.rank], path=path, out=out[c.rank], **options))
        return list(out)

    def close(self) -> None:
        """Give all memory back."""
        for rank in self.ranks:
            rank.close()
