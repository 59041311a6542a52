"""Ranks as threads of one process, added up by the reference: a model at any number of ranks without a process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from detinfer import bits
from detinfer.models.ranks import Ranks
from detinfer.ops.evidence import REFERENCE_NAME, from_bits, to_bits
from detinfer.reference.all_reduce import all_reduce

Sum = Callable[[list[Any], Any], Any]


def rotated(parts: Sequence[Any], dtype: Any) -> Any:
    """A wrong order: starts at rank 1 and ends with rank 0."""
    return all_reduce([*parts[1:], *parts[:1]], dtype)


class Together:
    """What the threads share; ``parts`` keeps every sum's terms, by the caller's name, in order."""

    def __init__(self, size: int, add: Sum = all_reduce) -> None:
        self.size, self.add = size, add
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=120)
        self.parts: list[tuple[str, list[torch.Tensor]]] = []

    def exchange(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class Thread(Ranks):
    """One rank of several."""

    def __init__(self, together: Together, rank: int) -> None:
        super().__init__()
        self._together, self.rank, self.size = together, rank, together.size

    @bits.unseen
    def all_reduce(self, x: torch.Tensor, name: str) -> torch.Tensor:
        parts = self._together.exchange(self.rank, x)
        if self.rank == 0:
            self._together.parts.append((name, parts))
        total = self._together.add([to_bits(part) for part in parts], REFERENCE_NAME[x.dtype])
        return from_bits(np.ascontiguousarray(total), x.dtype)

    @bits.unseen
    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._together.exchange(self.rank, x), -1)


def run(together: Together, work: Callable[[Ranks], Any]) -> list[Any]:
    """``work`` on every rank at once; its results by rank, or the first error."""
    results: list[Any] = [None] * together.size
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = work(Thread(together, rank))
        except BaseException as error:
            errors.append(error)
            together.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(together.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
