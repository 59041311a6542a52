"""Times of calls on one GPU, in replays of a CUDA graph: no host in between, as a serving engine runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch


def median(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], repeats: int) -> float:
    """Median microseconds of one call, from replays of a graph that holds a call for each of the ``inputs``.

    Each call is made once before, on a stream of its own: what it loads or proves is no part of a capture.
    """
    cuda: Any = torch.cuda  # untyped in torch
    side = cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for given in inputs:
            call(*given)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in inputs:
            call(*given)
    graph.replay()
    torch.cuda.synchronize()
    found: list[float] = []
    for _ in range(repeats):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(float(start.elapsed_time(end)) * 1e3 / len(inputs))
    return sorted(found)[repeats // 2]


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp of the mean of the logarithms."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
