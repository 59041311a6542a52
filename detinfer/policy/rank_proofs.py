"""Proofs of collectives: a path's bytes against the reference, on inputs for which a wrong order over ranks shows."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from detinfer.bits import as_bytes, dtype_name, unseen
from detinfer.collectives.calls import PATHS
from detinfer.collectives.communicator import Communicator
from detinfer.collectives.cuda import CudaCommunicator
from detinfer.collectives.cuda_paths import KNOWN
from detinfer.collectives.ordered_gather import reduce_gathered
from detinfer.collectives.stress import cancelling, special
from detinfer.errors import Diverged
from detinfer.policy.collectives import PEER_MEMORY, Collective
from detinfer.policy.policy import Proof
from detinfer.reference.all_reduce import Values
from detinfer.reference.all_reduce import all_reduce as reference

Run = Callable[[torch.Tensor, str | None], torch.Tensor]
"""A rank's call: its own tensor, of one dimension, and the way to take (None where there is one only)."""

_SHARE = 67
"""Elements of a rank's share: no multiple of a vector."""

_HALVES = ("float32", "bfloat16", "float16")


@functools.cache
def inputs(collective: Collective, reduction: str, dtype: torch.dtype, size: int) -> tuple[tuple[Values, ...], Values]:
    """(each rank's stored elements, what a whole reduction or gather of them gives).

    Raises Diverged where the elements would not show a rotated order.
    """
    count, name = size * _SHARE, dtype_name(dtype)
    random = np.random.default_rng([size, count])
    if collective == "all_gather":
        width = torch.empty((), dtype=dtype).element_size()
        drawn = random.integers(0, 2 if dtype is torch.bool else 256, (size, count * width), np.uint8)
        return tuple(drawn), drawn.reshape(-1)
    if name in _HALVES:
        parts = _turned(cancelling(size, count, name))  # type: ignore[arg-type]
        if reduction in ("max", "min"):
            odd = special(size, name)  # type: ignore[arg-type]
            parts = [np.concatenate([part, np.resize(more, 8 * count)]) for part, more in zip(parts, odd, strict=True)]
        read = name
    elif dtype is torch.float64:
        # float64 holds every bit of those sums: move the large terms away.
        parts = [part.view(np.float32).astype(np.float64) for part in cancelling(size, count, "float32")]
        parts[0], parts[-1] = parts[0] * 2.0**29, parts[-1] * 2.0**29
        parts = _turned(parts)
        read = None
    else:
        kind = np.dtype(name)
        parts = list(random.integers(np.iinfo(kind).min, np.iinfo(kind).max, (size, count), kind, endpoint=True))
        read = None
    whole = reference(parts, read, reduction)  # type: ignore[arg-type]
    if size > 2 and dtype.is_floating_point and reduction in ("sum", "avg"):
        for first in range(1, size):
            rotated = reference([*parts[first:], *parts[:first]], read, reduction)  # type: ignore[arg-type]
            if rotated.tobytes() == whole.tobytes():
                raise Diverged(f"the sum from rank {first} of {size} on gives the same bytes on the proof's inputs")
    return tuple(parts), whole


def _turned(parts: list[Values]) -> list[Values]:
    """The ranks' elements, then the same with the ranks moved on by one.

    Between three ranks, large and nearly its negative stand first and last: (x_1 + x_2) + x_0 rounds as (x_0 + x_1) + x_2
    does. Moved on, they meet at once.
    """
    return [np.concatenate([part, parts[r - 1]]) for r, part in enumerate(parts)]


@unseen
def tensor(values: Values, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Stored elements as a tensor of one dimension."""
    return torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).copy()).view(dtype).to(device)


def stored(result: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return as_bytes(result)


def compare(
    run: Run,
    ways: Sequence[str | None],
    subject: tuple[Collective, str, torch.dtype],
    rank: int,
    size: int,
    device: torch.device | str = "cpu",
) -> Proof:
    """The proof of ``run`` in each of ``ways`` on this rank; Diverged with the first byte that is another."""
    collective, reduction, dtype = subject
    parts, whole = inputs(collective, reduction, dtype, size)
    expected = np.split(whole, size)[rank] if collective == "reduce_scatter" else whole
    cases = 0
    for way in ways:
        got = np.frombuffer(stored(run(tensor(parts[rank], dtype, device), way)), np.uint8)
        want = np.frombuffer(expected.tobytes(), np.uint8)
        if got.shape != want.shape or not np.array_equal(got, want):
            where = int(np.flatnonzero(got != want)[0]) if got.shape == want.shape else 0
            raise Diverged(
                f"{collective} {reduction} of {dtype_name(dtype)} at rank {rank} of {size}{f' by {way}' if way else ''} "
                f"is not the reference: byte {where} of {len(want)}"
            )
        cases += want.size // torch.empty((), dtype=dtype).element_size()
    name = " ".join(filter(None, (collective, reduction, dtype_name(dtype), f"{size} ranks")))
    return Proof(name, f"detinfer.reference.{collective}", cases, hashlib.sha256(whole.tobytes()).hexdigest())


def shared_memory(ranks: Communicator | CudaCommunicator, collective: Collective, reduction: str) -> Run:
    """A communicator's collective as a proof calls it."""

    def run(own: torch.Tensor, way: str | None) -> torch.Tensor:
        path: Any = way
        if collective == "all_gather":
            return ranks.all_gather(own) if isinstance(ranks, Communicator) else ranks.all_gather(own, path=path)
        if collective == "reduce_scatter":
            return ranks.reduce_scatter(own, op=reduction, path=path)  # type: ignore[arg-type]
        return ranks.all_reduce(own, op=reduction, path=path)  # type: ignore[arg-type]

    return run


def ways(path: str, collective: Collective) -> tuple[str | None, ...]:
    """The ways that a proof has to take: those among which the path chooses by size."""
    if path == PEER_MEMORY:
        return KNOWN[collective]
    return PATHS[collective] if path.startswith("csrc/") and collective != "all_gather" else (None,)


def gathered(collective: Collective, reduction: str, parts: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """What the ordered gather makes of the ranks' tensors."""
    if collective == "all_gather":
        return torch.cat(list(parts))
    if collective == "reduce_scatter":
        parts = [part.chunk(len(parts))[rank] for part in parts]
    return reduce_gathered(parts, reduction)
