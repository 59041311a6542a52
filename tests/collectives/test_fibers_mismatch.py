"""Ranks that make different calls, on the CPU's GPU: each has RankMismatch, long before the time limit; others go on."""

from __future__ import annotations

import ctypes
import time
from dataclasses import replace

import pytest
import torch
from cuda_mismatch import CALLS, RANKS, Room, mistaken
from fibers import SMALL, Ranks, same, tensor_of

from detinfer.collectives import cuda_native
from detinfer.collectives.cuda import CudaCommunicator
from detinfer.collectives.stress import cancelling
from detinfer.errors import RankMismatch
from detinfer.reference import all_gather as gather_reference
from detinfer.reference import all_reduce as reference

pytestmark = pytest.mark.usefixtures("on_fibers")
FEW_BLOCKS = replace(SMALL, row_blocks=2)
LIMIT = 600.0
"""Seconds: a wait that ended by the time limit would be the whole suite's end."""


def _announced(ranks: Ranks) -> list[bytes]:
    """What every rank has been told, as it lies at the end of its buffer: two 64-bit words of each rank."""
    end = cuda_native.library().detinfer_gpu_buffer_bytes(ctypes.byref(SMALL.config(0, ranks.size, LIMIT)))
    return [ctypes.string_at(buffer + end - 128, 128) for buffer in ranks.buffers]


@pytest.mark.parametrize("most", list(CALLS)[:-1])
def test_one_makes_another_call(most: str) -> None:
    """Each call with each by one rank, after some that all make alike: every rank names a rank, its own call and that one's."""
    found = []
    names = list(CALLS)
    for turn, odd in enumerate(names[names.index(most) + 1 :]):
        first = 2**32 - 2 if turn % 4 == 0 else turn
        ranks = Ranks(RANKS, FEW_BLOCKS, timeout=LIMIT, first_sequence=first)
        rooms = [Room("cpu") for _ in range(RANKS)]
        alone = turn % RANKS
        made = [odd if rank == alone else most for rank in range(RANKS)]
        for name in ("all_gather push", "all_reduce two_shot", "few")[: turn % 4]:
            ranks.run(lambda c, name=name, rooms=rooms: CALLS[name].call(c, rooms[c.rank]))
        rooms = [Room("cpu") for _ in range(RANKS)]
        with pytest.raises(RankMismatch):
            ranks.run(lambda c, made=made, rooms=rooms: CALLS[made[c.rank]].call(c, rooms[c.rank]))
        said = [mistaken(comm, rooms[comm.rank], made) for comm in ranks.ranks]
        found += [(odd, alone, error) for error in said if error]
        ranks.close()
    assert found == []


def test_all_differ_and_one_comes_late() -> None:
    """Three calls in three places; and two ranks that differ need not wait for the third, who learns of it when it comes."""
    names = ("all_reduce push", "all_gather push", "all_reduce two_shot")
    for late in (False, True):
        ranks = Ranks(RANKS, timeout=LIMIT)
        rooms = [Room("cpu") for _ in range(RANKS)]
        for some in ((0, 1), (2,)) if late else ((0, 1, 2),):
            with pytest.raises(RankMismatch):
                ranks.run(lambda c, rooms=rooms: CALLS[names[c.rank]].call(c, rooms[c.rank]), ranks=some)
        for comm in ranks.ranks:
            assert mistaken(comm, rooms[comm.rank], names) == ""
        ranks.close()


@pytest.mark.parametrize("first", [0, 2**32 - 3])
def test_a_rank_that_is_late_is_waited_for(first: int) -> None:
    """The others announce their call meanwhile; then all have the reference's bytes, and older words disturb nobody."""
    ranks = Ranks(RANKS, timeout=LIMIT, first_sequence=first)
    before = _announced(ranks)
    assert before == [bytes(128)] * RANKS
    parts = cancelling(RANKS, 3000, "bfloat16")
    tensors = [tensor_of(part, "bfloat16") for part in parts]
    expected = reference.all_reduce(parts, "bfloat16")
    assert reference.all_reduce(parts[1:] + parts[:1], "bfloat16").tobytes() != expected.tobytes()
    gathered = gather_reference.all_gather(parts, 0)

    def late(rank: int, late_rank: int) -> None:
        """Until another rank has told this one of its call: on a busy machine that takes as long as it takes."""
        end = time.monotonic() + 60
        while rank == late_rank and _announced(ranks)[rank] == before[rank] and time.monotonic() < end:
            time.sleep(0.01)

    for turn, path in enumerate(("push", "push_tiles", "pull", "two_shot", "push", "push_tiles")):
        out = [torch.full_like(tensor, -3) for tensor in tensors]

        def sums(c: CudaCommunicator, turn: int = turn, path: str = path, out: list[torch.Tensor] = out) -> None:
            late(c.rank, turn % RANKS)
            c.all_reduce(tensors[c.rank], path=path, out=out[c.rank])

        ranks.run(sums)
        assert [same(each, expected) for each in out] == [True] * RANKS, (turn, path)
        assert _announced(ranks)[turn % RANKS] != before[turn % RANKS], "nobody has announced: it came too early"
        whole = ranks.run(lambda c: c.all_gather(tensors[c.rank], path="push"))
        assert [same(each, gathered) for each in whole] == [True] * RANKS
        before = _announced(ranks)
    ranks.close()
