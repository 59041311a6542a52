"""What holds a communicator of GPUs together: replayed graphs, counters that wrap, ranks that do not agree or come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_ranks import Here, same, tensor_of

from detinfer.collectives.stress import cancelling
from detinfer.errors import PeerError, RankMismatch, UsageError
from detinfer.reference import all_reduce as reference

pytestmark = pytest.mark.gpu

PATHS = ("push", "push_tiles", "pull", "two_shot")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_graph_replays(size: int, path: str) -> None:
    """A captured call gives the bytes of its inputs at each replay, between eager calls of other sizes and paths."""
    here = Here(size)
    sets = [cancelling(size, 6001, "bfloat16", seed) for seed in range(4)]
    expected = [tensor_of(reference.all_reduce(parts, "bfloat16"), "bfloat16").view(torch.int16) for parts in sets]
    given = [[tensor_of(part, "bfloat16") for part in parts] for parts in sets]
    x = [torch.empty_like(part) for part in given[0]]
    out = [torch.empty_like(part) for part in given[0]]
    other = [torch.empty_like(part[:97]) for part in given[0]]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(size)]
    here.run(lambda c: c.all_reduce(x[c.rank], path=path, out=out[c.rank]))
    graphs = []
    for rank, stream in zip(here.ranks, here.streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            rank.all_reduce(x[rank.rank], path=path, out=out[rank.rank])
            rank.all_reduce(out[rank.rank][:97], path="push", out=other[rank.rank])
        graphs.append(graph)
    wrong[0] += (out[0].view(torch.int16) != expected[0]).sum() * 0  # loads the kernels before anything spins
    torch.cuda.synchronize()
    for turn in range(300):
        pick = (turn * 7) % 4
        for r in range(size):
            with torch.cuda.stream(here.streams[r]):
                x[r].copy_(given[pick][r])
        for r in range(size):
            with torch.cuda.stream(here.streams[r]):
                graphs[r].replay()
        for r in range(size):
            with torch.cuda.stream(here.streams[r]):
                wrong[r] += (out[r].view(torch.int16) != expected[pick]).sum()
        if turn % 3 == 0:
            for r in range(size):
                with torch.cuda.stream(here.streams[r]):
                    here.ranks[r].all_reduce(x[r][: 500 + turn], path=PATHS[turn % 4], out=out[r][: 500 + turn])
    torch.cuda.synchronize()
    for rank in here.ranks:
        rank.check()
    assert [int(count) for count in wrong] == [0] * size
    here.close()


@pytest.mark.parametrize("first", [2**31 - 4, 2**32 - 4])
@pytest.mark.parametrize("path", PATHS)
def test_counters_wrap(path: str, first: int) -> None:
    """Around the middle and the end of the 32-bit counters nothing changes; large calls leave old packets behind."""
    here = Here(3, first_sequence=first)
    for turn in range(10):
        parts = cancelling(3, 20000 if turn % 3 == 0 else 50 + turn, "float16", turn)
        tensors = [tensor_of(part, "float16") for part in parts]
        expected = reference.all_reduce(parts, "float16")
        assert all(same(out, expected) for out in here.all_reduce(tensors, path)), turn
    here.close()


@pytest.mark.parametrize("path", PATHS)
def test_other_calls_are_seen(path: str) -> None:
    """Ranks that reduce different numbers of elements, or in another order, get an error and no numbers."""
    for options in ({"n": (1000, 1001)}, {"order": ("rank_order", "rank_tree")}):
        here = Here(2, timeout=2.0)
        x = [torch.ones(n, dtype=torch.bfloat16, device="cuda") for n in options.get("n", (1000, 1000))]
        out = [torch.zeros_like(part) for part in x]
        orders: Any = options.get("order", ("rank_order", "rank_order"))
        with pytest.raises(
            RankMismatch, match=r"rank [01] made another call than rank [01], which was in all_reduce of 100"
        ):
            here.run(lambda c: c.all_reduce(x[c.rank], path=path, order=orders[c.rank], out=out[c.rank]))  # noqa: B023
        assert all(bool((each.isnan() | (each == 0)).all()) for each in out)
        assert any(bool(each.isnan().any()) for each in out)
        with pytest.raises(RankMismatch):
            here.ranks[0].all_reduce(x[0], path=path)
        here.close()


OTHERS: dict[str, Any] = {
    "dtype": lambda c, x: c.all_reduce(x.half() if c.rank == 2 else x, path="push"),
    "op": lambda c, x: c.all_reduce(x, op="max" if c.rank == 2 else "sum", path="push"),
    "path": lambda c, x: c.all_reduce(x, path="two_shot@2x512" if c.rank == 2 else "two_shot@3x512"),
    "collective": lambda c, x: (
        c.all_gather(x, path="push_tiles") if c.rank == 2 else c.all_reduce(x, path="push_tiles")
    ),
    "eps": lambda c, x: c.all_reduce_rms_norm(x, x, None, 1e-5 if c.rank == 2 else 1e-6, path="push"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_one_of_four_calls_something_else(what: str) -> None:
    """The ranks that agree name the one that does not, within the time limit; what they hold is NaN, not a sum."""
    here = Here(4, timeout=1.0)
    x = torch.ones(16, 64, dtype=torch.bfloat16, device="cuda")
    x.half()  # loads the kernel before anything spins
    torch.cuda.synchronize()
    found: list[Any] = []
    for rank, stream in zip(here.ranks, here.streams, strict=True):
        with torch.cuda.stream(stream):
            found.append(OTHERS[what](rank, x))
    torch.cuda.synchronize()
    for rank in (0, 1, 3):
        with pytest.raises(RankMismatch, match=rf"rank 2 made another call than rank {rank}, "):
            here.ranks[rank].check()
        for each in found[rank] if isinstance(found[rank], tuple) else (found[rank],):
            assert bool(each.isnan().any())
            assert not bool((each == 4).any())
    with pytest.raises(RankMismatch, match="than rank 2, "):
        here.ranks[2].check()
    here.close()


@pytest.mark.parametrize("path", PATHS)
def test_absent_rank_is_named(path: str) -> None:
    """A rank that never calls ends the others' wait after the time limit, and is named; nothing hangs."""
    here = Here(3, timeout=0.3)
    x = torch.ones(5000, dtype=torch.float32, device="cuda")
    out = [torch.zeros_like(x) for _ in range(3)]
    torch.cuda.synchronize()
    for rank in (0, 2):
        with torch.cuda.stream(here.streams[rank]):
            here.ranks[rank].all_reduce(x, path=path, out=out[rank])
    torch.cuda.synchronize()
    for rank in (0, 2):
        with pytest.raises(PeerError, match=rf"rank {rank} waited 0.3 s for rank 1 in all_reduce of 5000 x float32"):
            here.ranks[rank].check()
        assert bool(out[rank].isnan().all())
    here.ranks[1].check()
    here.close()


def test_bad_input() -> None:
    """What cannot be right is refused before anything is launched."""
    here = Here(2)
    rank = here.ranks[0]
    x = torch.ones(16, 24, device="cuda")
    with pytest.raises(UsageError, match="on cpu"):
        rank.all_reduce(x.cpu())
    long = torch.ones(2, 16392, device="cuda")
    with pytest.raises(UsageError, match="rows of 16392 elements"):
        rank.all_reduce_rms_norm(long, long, None, 1e-6)
    with pytest.raises(UsageError, match=r"x \[16, 21\], with 24 weights"):
        rank.all_reduce_rms_norm(x[:, :21], x[:, :21], x[0], 1e-6)
    with pytest.raises(UsageError, match="no 2 equal slices"):
        rank.reduce_scatter(x[:15])
    with pytest.raises(UsageError, match="path 'ring' is one of"):
        rank.all_reduce(x, path="ring")
    rank.close()
    with pytest.raises(UsageError, match="closed"):
        rank.all_reduce(x)
    here.close()
