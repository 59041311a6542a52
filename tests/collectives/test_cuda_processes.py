"""Real processes, a GPU each: the bytes of the reference in a tight loop, and ranks that are not what they should be."""

from __future__ import annotations

import pytest
import torch
from cuda_processes import absent, compiled, two_communicators
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
