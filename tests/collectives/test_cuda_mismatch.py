"""Ranks that make different calls: each has RankMismatch, long before the time limit; a rank that is late is waited for."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from cuda_mismatch import CALLS, RANKS, Room, mistaken
from cuda_ranks import Here, same, tensor_of

from detinfer.collectives.stress import cancelling
from detinfer.reference import all_gather as gather_reference
from detinfer.reference import all_reduce as reference

pytestmark = pytest.mark.gpu

LIMIT = 100.0
"""Seconds: far more than a test may take."""


def _call(here: Here, rooms: list[Room], names: list[str], order: list[int]) -> None:
    for rank in order:
        with torch.cuda.stream(here.streams[rank]):
            CALLS[names[rank]].call(here.ranks[rank], rooms[rank])


@pytest.mark.parametrize("most", CALLS)
def test_one_makes_another_call(most: str) -> None:
    """All other calls by one rank, after some that all make alike: every rank names a rank, its own call and that one's."""
    found = []
    for turn, odd in enumerate(name for name in CALLS if name != most):
        here = Here(RANKS, timeout=LIMIT, first_sequence=2**32 - 2 if turn % 4 == 0 else turn)
        rooms = [Room("cuda") for _ in range(RANKS)]
        alone = turn % RANKS
        torch.cuda.synchronize()
        for name in ("all_gather push", "all_reduce two_shot", "few")[: turn % 4]:
            _call(here, rooms, [name] * RANKS, [0, 1, 2])
        torch.cuda.synchronize()
        rooms = [Room("cuda") for _ in range(RANKS)]
        torch.cuda.synchronize()
        made = [odd if rank == alone else most for rank in range(RANKS)]
        _call(here, rooms, made, [2, 0, 1])
        torch.cuda.synchronize()
        said = [mistaken(comm, rooms[comm.rank], made) for comm in here.ranks]
        found += [(odd, alone, error) for error in said if error]
        here.close()
    assert found == []


@pytest.mark.parametrize("late", [False, True], ids=["together", "the third later"])
def test_all_differ(late: bool) -> None:
    """Three calls in three places; and two ranks that differ need not wait for the third, who learns of it when it comes."""
    names = ["all_reduce push", "all_gather push", "all_reduce two_shot"]
    here = Here(RANKS, timeout=LIMIT)
    rooms = [Room("cuda") for _ in range(RANKS)]
    torch.cuda.synchronize()
    for some in ([0, 1], [2]) if late else ([0, 1, 2],):
        _call(here, rooms, names, some)
        torch.cuda.synchronize()
    for comm in here.ranks:
        assert mistaken(comm, rooms[comm.rank], names) == ""
    here.close()


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "replayed"])
def test_a_rank_that_is_late_is_waited_for(graph: bool) -> None:
    """The others announce their call meanwhile; then all have the reference's bytes, and older words disturb nobody."""
    here = Here(RANKS, timeout=LIMIT)
    parts = cancelling(RANKS, 3000, "bfloat16")
    expected = reference.all_reduce(parts, "bfloat16")
    assert reference.all_reduce(parts[1:] + parts[:1], "bfloat16").tobytes() != expected.tobytes()
    gathered = gather_reference.all_gather(parts, 0)
    tensors = [tensor_of(part, "bfloat16") for part in parts]
    out = [torch.zeros_like(tensor) for tensor in tensors]
    whole = [torch.zeros(3 * 3000, dtype=torch.bfloat16, device="cuda") for _ in range(RANKS)]

    def calls(comm: Any, path: str) -> None:
        comm.all_reduce(tensors[comm.rank], path=path, out=out[comm.rank])
        comm.all_gather(tensors[comm.rank], path="push", out=whole[comm.rank])

    replays: dict[tuple[int, str], Any] = {}
    paths = ("push", "push_tiles", "pull", "two_shot")
    for path in paths:
        here.run(lambda c, path=path: calls(c, path))
        for rank in range(RANKS) if graph else ():
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=here.streams[rank]):
                calls(here.ranks[rank], path)
            replays[rank, path] = captured
    torch.cuda.synchronize()
    for turn in range(12):
        path = paths[turn % 4]
        for each in (*out, *whole):
            each.zero_()
        torch.cuda.synchronize()
        last = turn % RANKS
        for rank in [*({*range(RANKS)} - {last}), last]:
            if rank == last:
                time.sleep(0.05)
            with torch.cuda.stream(here.streams[rank]):
                if graph:
                    replays[rank, path].replay()
                else:
                    calls(here.ranks[rank], path)
        torch.cuda.synchronize()
        for comm in here.ranks:
            comm.check()
        assert [same(each, expected) for each in out] == [True] * RANKS, (turn, path)
        assert [same(each, gathered) for each in whole] == [True] * RANKS, (turn, path)
    here.close()
