"""Tensors on their way to a file: written to the disk as they come, so that memory holds one of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from detinfer import bits

_ALIGN = 16


class Spool(Mapping[str, torch.Tensor]):
    """Tensors by name in one file at ``path``; what is read is mapped from it and counts as memory while it is used.

    ``size`` is the number of bytes of all of them. ``close`` removes the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_bytes(b"")
        self._end = 0
        self._held: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        self.size = 0

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor's bytes as they are now."""
        place = -(-self._end // _ALIGN) * _ALIGN
        with self._path.open("ab") as file:  # opened anew: nothing is left open by a writer that nobody closes
            file.write(bytes(place - self._end))
            self._end = place + file.write(bits.as_memory(tensor))
        self._held[name] = tensor.dtype, tuple(tensor.shape), place
        self.size += tensor.numel() * tensor.dtype.itemsize

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype, shape, place = self._held[name]
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        mapped = np.memmap(self._path, dtype=np.uint8, mode="c", offset=place, shape=(size,))
        return torch.from_numpy(mapped).view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._held, self.size = {}, 0
        self._path.unlink(missing_ok=True)
