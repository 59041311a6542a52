"""Real processes, a GPU each: the bytes of the reference in a tight loop, and ranks that are not what they should be."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from cuda_processes import absent, compiled, exits, in_graphs, told, two_communicators
from cuda_stress import SHAPES, work

from detinfer.bench import cuda_timing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here: ranks in processes need two"),
]


def test_stress() -> None:
    """13 shapes, eager and replayed, by every path: no byte differs."""
    lines = cuda_timing.run(2, work, 200, True, limit_s=250.0)
    assert len(lines) >= 8 * len(SHAPES)
    assert [line for line in lines if line.get("wrong") != 0] == []


def test_two_communicators() -> None:
    """They do not disturb each other."""
    assert cuda_timing.run(2, two_communicators, limit_s=100.0) == [True] * 4


def test_absent_rank() -> None:
    """The wait is bounded, and names the rank."""
    message, seconds = cuda_timing.run(2, absent, limit_s=100.0)
    assert "rank 0 waited 1 s for rank 1 in all_reduce of 4096 x float32" in message
    assert seconds < 5


def test_expandable_segments() -> None:
    """The communicator's memory is its own, whatever torch's allocator does."""
    assert cuda_timing.run(2, compiled, limit_s=100.0) == (True, torch.Size([5000]))


def test_a_rank_that_exits(tmp_path: Path) -> None:
    """Its process ends; the others' next call ends within the time limit and names it."""
    size = min(torch.cuda.device_count(), 4)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    store = f"file://{tmp_path}/store"
    processes = [context.Process(target=exits, args=(rank, size, store, queue)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        for _ in range(size - 1):
            message = queue.get(timeout=60)
            assert message.startswith("PeerError: rank ")
            assert f"waited 2 s for rank {size - 1} in all_reduce of 4096 x float32" in message
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_what_cannot_be_joined() -> None:
    """A rank with a wrong table, another geometry, a tensor of another GPU: every rank has an error, none waits."""
    first, second = (cuda_timing.run(2, told, rank, limit_s=100.0) for rank in (0, 1))
    assert first[0].startswith("InfrastructureError: connect: rank 1: table of paths /nowhere/table.json")
    assert second[0].startswith("UsageError: table of paths /nowhere/table.json")
    for rank, found in enumerate((first, second)):
        assert "has geometry or paths" in found[1]
        for line in found[2:]:
            assert f"a tensor is on cuda:{1 - rank}; the communicator of rank {rank} on cuda:{rank}" in line


def test_compiled_with_graphs() -> None:
    """torch.compile keeps the collectives in one graph, which Inductor captures as a CUDA graph and replays."""
    assert cuda_timing.run(2, in_graphs, limit_s=200.0) == [0] * 5
