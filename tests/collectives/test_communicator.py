"""Ranks that differ, die, leave, come late or never: an error that names them, on every rank that waits, and no data."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import Call, Ranks, Tensor

from detinfer.collectives import connect
from detinfer.collectives.stress import cancelling
from detinfer.errors import PeerError, UnsupportedDtype, UsageError
from detinfer.reference.all_reduce import all_reduce

X = Tensor(np.ones(6, np.float32), "float32")
PATIENCE = 2.0
"""Seconds that a rank waits in the tests of late ones: short, for the suite's sake."""


@pytest.fixture
def fresh() -> Any:
    """Makes processes of a test's own, which may die."""
    made: list[Ranks] = []

    def make(size: int, **options: Any) -> Ranks:
        made.append(Ranks(size))
        assert made[-1].connect(size, "main", **{"timeout": 60.0, "staging": 4096, **options}) == [None] * size
        return made[-1]

    yield make
    for group in made:
        group.close()


def kinds(found: list[list[Any]]) -> list[Any]:
    """The name of each rank's error, None where a call gave a result."""
    return [results[-1][0] if isinstance(results[-1], tuple) else None for results in found]


@pytest.mark.parametrize(
    ("method", "arguments", "options", "words"),
    [
        ("all_reduce", (Tensor(np.ones(7, np.float32), "float32"),), {}, "7 x float32"),
        ("all_reduce", (Tensor(np.ones(6, np.float16), "float16"),), {}, "6 x float16"),
        ("all_reduce", (X,), {"op": "max"}, "max"),
        ("all_reduce", (X,), {"order": "rank_tree"}, "rank_tree"),
        ("all_reduce", (X,), {"path": "2stage"}, "2stage"),
        ("reduce_scatter", (X,), {}, "reduce_scatter"),
        ("all_gather", (X,), {}, "all_gather"),
        ("all_reduce_rms_norm", (X, X, None, 1e-6), {}, "all_reduce_rms_norm"),
        ("barrier", (), {}, "barrier"),
    ],
    ids=["count", "dtype", "op", "order", "path", "reduce_scatter", "all_gather", "all_reduce_rms_norm", "barrier"],
)
@pytest.mark.parametrize("odd", [0, 2])
def test_ranks_that_differ(
    group: Ranks, method: str, arguments: tuple[Any, ...], options: dict[str, Any], words: str, odd: int
) -> None:
    """One rank calls something else: every rank has an error that shows both calls, and the next call works."""
    usual, other = Call("all_reduce", (X,), {}, "3"), Call(method, arguments, options, "3")
    found = group.run([[other if r == odd else usual, usual] for r in range(3)])
    for first, second in found:
        assert first[0] == "RankMismatch"
        assert words in first[1]
        assert f"rank {odd}: " in first[1]
        assert second.view(np.float32).tolist() == [3.0] * 6


def test_a_mismatch_writes_nothing(group: Ranks) -> None:
    """The tensor that was to be written in place is as it was."""
    calls = [
        [Call("all_reduce", (Tensor(np.ones(5000 + r, np.float32), "float32"),), {"out": "same"}, "2")] for r in (0, 1)
    ]
    assert kinds(group.run(calls)) == ["RankMismatch"] * 2


@pytest.mark.parametrize("ending", ["die", "exit"])
@pytest.mark.parametrize("size", [2, 5])
def test_a_rank_that_ends(fresh: Any, ending: str, size: int) -> None:
    """The others are told which rank died in which call within moments, not after the timeout, and ever after."""
    group = fresh(size)
    usual = Call("all_reduce", (X,))
    last = size - 1
    assert kinds(group.run([[usual]] * size)) == [None] * size
    start = time.monotonic()
    found = group.run([[Call(ending)] if r == last else [usual, Call("barrier")] for r in range(size)])
    assert time.monotonic() - start < 30
    for first, second in found[:last]:
        for error in (first, second):
            assert error[0] == "PeerError"
            assert f"rank {last} died" in error[1]
            assert "all_reduce, call 2" in error[1]


def test_a_rank_that_leaves(fresh: Any) -> None:
    """A closed communicator is told apart from a death; the one that closed it has an error of its own."""
    group = fresh(3)
    found = group.run([[Call("close"), Call("barrier")] if r == 1 else [Call("barrier")] for r in range(3)])
    assert kinds(found) == ["PeerError", "UsageError", "PeerError"]
    assert "rank 1 closed its communicator" in found[0][-1][1]
    assert "is closed" in found[1][-1][1]


def test_a_rank_that_never_comes(fresh: Any) -> None:
    """After the timeout the others name it and the call; when it does come it is told too."""
    group = fresh(3, timeout=PATIENCE)
    late = [Call("sleep", (PATIENCE + 1.5,)), Call("all_reduce", (X,))]
    found = group.run([late if r == 1 else [Call("all_reduce", (X,))] for r in range(3)])
    assert kinds(found) == ["PeerError"] * 3
    for results in found:
        assert f"all_reduce, call 1 of this communicator: rank 1 did not arrive within {PATIENCE:g} s" in results[-1][1]
    assert found[0][-1][2] >= PATIENCE * 0.9


def test_a_rank_that_comes_late(group: Ranks) -> None:
    """Within the timeout: the same bytes as ever."""
    parts = cancelling(4, 77, "float32")
    calls = [
        [*([Call("sleep", (0.5,))] if r in (0, 2) else []), Call("all_reduce", (Tensor(part, "float32"),), {}, "4")]
        for r, part in enumerate(parts)
    ]
    expected = all_reduce(parts, "float32").tobytes()
    assert [results[-1].tobytes() for results in group.run(calls)] == [expected] * 4


def test_many_calls_of_all_kinds(group: Ranks) -> None:
    """Results do not depend on what was called before: banks are not mixed up between calls of 1 and 2 stages."""
    parts = cancelling(3, 3000, "float32")
    expected = all_reduce(parts, "float32").tobytes()
    random = np.random.default_rng(0)
    paths = [("1stage", "2stage")[i] for i in random.integers(0, 2, 60)]
    calls = []
    for part in parts:
        own: list[Call] = []
        for path in paths:
            own.append(Call("all_reduce", (Tensor(part, "float32"),), {"path": path}, "3"))
            own.append(Call("all_gather", (Tensor(part[:9], "float32"),), {}, "3"))
        calls.append(own)
    for results in group.run(calls):
        assert {result.tobytes() for result in results[::2]} == {expected}
        assert {result.tobytes() for result in results[1::2]} == {b"".join(part[:9].tobytes() for part in parts)}


def test_a_group_of_torch_distributed(tmp_path: Path) -> None:
    """connect() joins the ranks of the default group."""
    group = Ranks(3)
    try:
        store = f"file://{tmp_path / 'store'}"
        found = group.run(
            [
                [
                    Call("init_process_group", (), {"init_method": store, "rank": r, "world_size": 3}),
                    Call("connect", (), {"timeout": 60.0}),
                    Call("all_reduce", (X,)),
                ]
                for r in range(3)
            ]
        )
        for results in found:
            assert results[:2] == [None, None]
            assert results[2].view(np.float32).tolist() == [3.0] * 6
    finally:
        group.close()


def test_connecting_without_a_rank() -> None:
    """A rank that never connects is named, by rank 0 and by those who wait for rank 0."""
    group = Ranks(3)
    try:
        name = f"missing-{os.getpid()}"
        options = {"name": name, "size": 3, "timeout": PATIENCE}
        found = group.run([[Call("connect", (), {**options, "rank": r})] for r in (0, 1)])
        for results in found:
            assert results[0][0] == "PeerError"
            assert "rank 2 did not arrive" in results[0][1]
        found = group.run([[Call("connect", (), {**options, "rank": r})] for r in (1, 2)])
        for results in found:
            assert results[0][0] == "PeerError"
            assert "rank 0 did not arrive" in results[0][1]
    finally:
        group.close()


def test_connecting_with_other_settings() -> None:
    """Ranks that disagree on the number of ranks, or that are the same rank, are told so."""
    group = Ranks(2)
    try:
        name = f"disagree-{os.getpid()}"
        settings = {"name": name, "timeout": 20.0}
        for first, second in (({"size": 2}, {"size": 3}), ({"size": 3}, {"size": 3, "staging": 512})):
            calls = [[Call("connect", (), {**settings, **own, "rank": r})] for r, own in enumerate((first, second))]
            for results in group.run(calls):
                assert results[0][0] == "UsageError"
                assert "disagree" in results[0][1]
    finally:
        group.close()


def test_arguments_that_are_wrong_alone() -> None:
    """Raised before anybody is met."""
    with pytest.raises(UsageError, match="1 to 8"):
        connect(name="x", rank=8, size=9)
    with pytest.raises(UsageError, match="all three"):
        connect(name="x", rank=0)
    with pytest.raises(UsageError, match="multiple of 64"):
        connect(name="x", rank=0, size=1, staging=100)
    with pytest.raises(UsageError, match="not initialized"):
        connect()
    with pytest.raises(PeerError, match="rank 1 did not arrive"):
        connect(name=f"alone-{os.getpid()}", rank=0, size=2, timeout=0.2)
    import torch

    with connect(name="x", rank=0, size=1) as ranks:
        with pytest.raises(UnsupportedDtype, match="complex64"):
            ranks.all_reduce(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(UsageError, match="average"):
            ranks.all_reduce(torch.zeros(2, dtype=torch.int32), op="avg")
        with pytest.raises(UsageError, match="order 'ring'"):
            ranks.all_reduce(torch.zeros(2), order="ring")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="3stage"):
            ranks.all_reduce(torch.zeros(2), path="3stage")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="they have to agree"):
            ranks.all_reduce(torch.zeros(2), out=torch.zeros(3))
        with pytest.raises(UsageError, match="on cpu"):
            ranks.all_reduce(torch.zeros(2, device="meta"))
    with pytest.raises(UsageError, match="closed"):
        ranks.barrier()


def test_nothing_has_a_name(group: Ranks) -> None:
    """The ranks' memory is in no file system: the kernel frees it with the last of them."""
    maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in group.processes]
    lines = [line for text in maps for line in text.splitlines() if "detinfer" in line and ".so" not in line]
    assert lines
    assert all("/memfd:detinfer (deleted)" in line for line in lines)
    assert [path for path in Path("/dev/shm").iterdir() if "detinfer" in path.name] == []
