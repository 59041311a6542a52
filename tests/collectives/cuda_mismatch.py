"""Calls that ranks may make instead of each other, each in its own place of the communicator's memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from detinfer.collectives.cuda import CudaCommunicator
from detinfer.errors import RankMismatch

RANKS = 3
ROWS, WIDTH = 4 * RANKS, 64


class Room:
    """A rank's tensors: calls allocate nothing, which could wait for a kernel that waits."""

    def __init__(self, device: str) -> None:
        self.x = torch.ones(ROWS, WIDTH, device=device)
        self.residual = torch.ones_like(self.x)
        self.out, self.total = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.part = torch.zeros(ROWS // RANKS, WIDTH, device=device)
        self.whole = torch.zeros(RANKS * ROWS, WIDTH, device=device)

    def no_numbers(self, rank: int) -> bool:
        """Whether all that was written is NaN, and something was; but for what the rank gathers from itself."""
        theirs = [self.whole[r * ROWS : (r + 1) * ROWS] for r in range(RANKS) if r != rank]
        written = torch.cat([t.flatten() for t in (self.out, self.total, self.part, *theirs)])
        return bool((written.isnan() | (written == 0)).all()) and bool(written.isnan().any())


class Kind(NamedTuple):
    """A call, what an error says of it, and where its ranks look for each other's hash."""

    call: Callable[[CudaCommunicator, Room], Any]
    words: str
    place: str


def _all_reduce(path: str, op: Any = "sum", few: int = 0) -> Callable[[CudaCommunicator, Room], Any]:
    def call(c: CudaCommunicator, room: Room) -> None:
        x, out = (t.view(-1)[:few] if few else t for t in (room.x, room.out))
        c.all_reduce(x, op=op, path=path, out=out)

    return call


def _rows(path: str) -> Callable[[CudaCommunicator, Room], Any]:
    return lambda c, room: c.all_reduce_rms_norm(
        room.x, room.residual, None, 1e-6, path=path, out=room.out, residual_out=room.total
    )


ALL = ROWS * WIDTH
PLACES = {"push": "blanks", "push_tiles": "tiles", "pull": "tiles", "two_shot": "parts"}
CALLS = {
    **{
        f"all_reduce {path}": Kind(_all_reduce(path), f"all_reduce of {ALL} x float32 by {path}", place)
        for path, place in PLACES.items()
    },
    "average": Kind(_all_reduce("push", "avg"), f"all_reduce of {ALL} x float32 by push", "blanks"),
    "few": Kind(_all_reduce("push", few=4), "all_reduce of 4 x float32 by push", "blanks"),
    **{
        f"reduce_scatter {path}": Kind(
            lambda c, room, path=path: c.reduce_scatter(room.x, path=path, out=room.part),  # type: ignore[misc]
            f"reduce_scatter of {ALL // RANKS} x float32 by {path}",
            PLACES[path],
        )
        for path in ("push", "two_shot")
    },
    **{
        f"all_gather {path}": Kind(
            lambda c, room, path=path: c.all_gather(room.x, path=path, out=room.whole),  # type: ignore[misc]
            f"all_gather of {ALL * 4} bytes by {path}",
            place,
        )
        for path, place in (("push", "packets"), ("push_tiles", "tiles"))
    },
    **{
        f"all_reduce_rms_norm {path}": Kind(_rows(path), f"all_reduce_rms_norm of {ALL} x float32 by {path}", place)
        for path, place in PLACES.items()
    },
}


def mistaken(comm: CudaCommunicator, room: Room, made: Sequence[str]) -> str:
    """What is wrong with what a rank found where the ranks ``made`` these calls; empty where all is as it has to be.

    It has to raise RankMismatch that names a rank whose call was another, and that one's call, and to hold no number.
    """
    try:
        comm.check()
    except RankMismatch as error:
        said, own = str(error), made[comm.rank]
        others = [peer for peer in range(RANKS) if made[peer] != own]
        if all(_wrong(said, comm.rank, peer, CALLS[own], CALLS[made[peer]]) for peer in others):
            return said
        return "" if room.no_numbers(comm.rank) else f"rank {comm.rank} holds numbers of another"
    return f"rank {comm.rank} found no mismatch"


def _wrong(error: str, rank: int, peer: int, own: Kind, other: Kind) -> bool:
    """Whether a rank's error does not name the peer, the rank's call and, where only that one can say it, its."""
    found = re.fullmatch(
        rf"rank (\d) made another call than rank {rank}, which was in {re.escape(own.words)} "
        r"\(exchange \d+ of channel \d+\)(?:; rank (\d) was in ([^;]*))?; its outputs hold NaN.*",
        error,
    )
    if found is None or int(found[1]) != peer:
        return True
    theirs = other.words + (" too, with other options" if own.words == other.words else "")
    return (found[2], found[3]) not in [(found[1], theirs)] + ([(None, None)] if own.place == other.place else [])
