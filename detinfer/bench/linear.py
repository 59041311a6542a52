"""The linear layers of a model against torch's, both sides in turn in one run.

The shapes are SmolLM2-135M's, all 211 layers with weights of their own (0.5 GB in fp32), so that at one row the
weights come from memory as they do in a decode step and not from a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from detinfer import threads as held
from detinfer.ops.matmul import linear

_LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
SHAPES = (*(_LAYER * 30), (49152, 576))
"""(N, K) of every linear layer of SmolLM2-135M: q, k, v, o, gate, up, down of 30 blocks, then lm_head."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 8, 64, 512)

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Timing:
    """All layers once, at ``rows`` rows: seconds of both sides.

    ``torch`` and ``detinfer`` sum each layer's least time over the repeats, which other load on the machine disturbs
    least; ``passes`` is the median of the ratios of whole neighbouring passes, with whatever disturbed them.
    """

    dtype: str
    rows: int
    threads: int
    torch: float
    detinfer: float
    passes: float

    @property
    def ratio(self) -> float:
        """detinfer's time over torch's."""
        return self.detinfer / self.torch


def run(
    dtypes: Sequence[torch.dtype] = DTYPES, rows: Sequence[int] = ROWS, threads: int = 2, repeats: int = 5
) -> Iterator[Timing]:
    """Time torch.nn.functional.linear and detinfer's at every dtype and number of rows."""
    with held.threads(threads), torch.inference_mode():
        for dtype in dtypes:
            weights = [torch.randint(-128, 128, shape).to(dtype) for shape in SHAPES]
            for count in rows:
                yield _compare(dtype, count, threads, weights, repeats)
            del weights


def _compare(dtype: torch.dtype, rows: int, threads: int, weights: list[torch.Tensor], repeats: int) -> Timing:
    inputs = {k: torch.randint(-128, 128, (rows, k)).to(dtype) for _, k in set(SHAPES)}
    sides: tuple[Linear, Linear] = (torch.nn.functional.linear, linear)
    passes: tuple[list[list[float]], list[list[float]]] = ([], [])
    for _ in range(repeats + 1):
        for side, function in enumerate(sides):
            passes[side].append(_one_pass(function, inputs, weights))
    plain, ours = (side[1:] for side in passes)  # the first pair warms up
    ratios = sorted(sum(b) / sum(a) for a, b in zip(plain, ours, strict=True))
    return Timing(
        dtype=str(dtype).removeprefix("torch."),
        rows=rows,
        threads=threads,
        torch=sum(map(min, zip(*plain, strict=True))),
        detinfer=sum(map(min, zip(*ours, strict=True))),
        passes=ratios[len(ratios) // 2],
    )


def _one_pass(function: Linear, inputs: dict[int, torch.Tensor], weights: list[torch.Tensor]) -> list[float]:
    """Seconds of each layer."""
    seconds = []
    for weight in weights:
        x = inputs[weight.shape[1]]
        start = time.perf_counter()
        function(x, weight)
        seconds.append(time.perf_counter() - start)
    return seconds


def table(timings: Sequence[Timing]) -> Table:
    """The timings as a table for a terminal."""
    threads = sorted({t.threads for t in timings})
    shown = Table(title=f"SmolLM2-135M's linear layers, {', '.join(map(str, threads))} threads, ms")
    for heading in ("dtype", "rows", "torch", "detinfer", "detinfer / torch", "whole passes"):
        shown.add_column(heading, justify="left" if heading == "dtype" else "right")
    for t in timings:
        milliseconds = (f"{t.torch * 1e3:.1f}", f"{t.detinfer * 1e3:.1f}")
        shown.add_row(t.dtype, str(t.rows), *milliseconds, f"{t.ratio:.2f}", f"{t.passes:.2f}")
    return shown
