"""bf16 linear layers on a GPU against torch's default, in replays of a CUDA graph, both sides in one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table

from detinfer.bits import first_mismatch
from detinfer.errors import Diverged
from detinfer.ops.matmul_cuda import linear
from detinfer.ops.matmul_cuda_proof import adversarial, prove_shape

SHAPES = {
    "Qwen3-8B": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
    "Llama-3-70B, TP 8": ((1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)),
    "gpt-oss": ((5120, 2880), (2880, 4096)),
}
"""(N, K) of the layers of each model."""

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
_COLD_BYTES = 260 << 20  # of weights in one replay: several times the second cache


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one product on both sides, and the least that moving its operands once can take."""

    model: str
    n: int
    k: int
    rows: int
    torch: float
    detinfer: float

    @property
    def ratio(self) -> float:
        """detinfer's time over torch's."""
        return self.detinfer / self.torch


def run(rows: Sequence[int] = ROWS, repeats: int = 15) -> Iterator[Timing]:
    """Time every shape; the bytes are compared with the reference path's first, and a difference raises Diverged."""
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.inference_mode():
        for model, shapes in SHAPES.items():
            for n, k in shapes:
                copies = max(2, min(12, _COLD_BYTES // (n * k * 2)))
                weights = [adversarial(n, k, torch.bfloat16, device, i) for i in range(copies)]
                prove_shape(n, k, torch.bfloat16, device)
                for count in rows:
                    x = adversarial(count, k, torch.bfloat16, device, count)
                    head = min(count, 64)
                    if first := first_mismatch(
                        linear(x, weights[0])[:head], linear(x[:head], weights[0], path="reference")
                    ):
                        raise Diverged(f"linear of {count} x {k} x {n}: {first}")
                    ours = _graph(partial(linear, x), weights, repeats)
                    plain = _graph(partial(_default, x), weights, repeats)
                    yield Timing(model, n, k, count, plain, ours)


def _default(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.t())


def _graph(call: Callable[[torch.Tensor], torch.Tensor], weights: Sequence[torch.Tensor], repeats: int) -> float:
    """Median microseconds of one call, from replays of a graph of a call for each of the weights."""
    cuda: Any = torch.cuda  # untyped in torch
    side = cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for weight in weights:
            call(weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            call(weight)
    graph.replay()
    torch.cuda.synchronize()
    found: list[float] = []
    for _ in range(repeats):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(float(start.elapsed_time(end)) * 1e3 / len(weights))
    return sorted(found)[repeats // 2]


def geometric_mean(timings: Sequence[Timing]) -> float:
    """Of the ratios."""
    return math.exp(sum(math.log(t.ratio) for t in timings) / len(timings))


def table(timings: Sequence[Timing]) -> Table:
    """The ratios, a line for each shape and a column for each number of rows."""
    rows = sorted({t.rows for t in timings})
    shown = Table(title="bf16 linear, detinfer / torch, CUDA graph")
    shown.add_column("K -> N")
    for count in rows:
        shown.add_column(str(count), justify="right")
    for n, k in dict.fromkeys((t.n, t.k) for t in timings):
        by_rows = {t.rows: t for t in timings if (t.n, t.k) == (n, k)}
        shown.add_row(f"{k} -> {n}", *(f"{by_rows[count].ratio:.2f}" for count in rows))
    return shown
