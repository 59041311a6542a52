"""Norms and softmax along rows on a GPU against torch's default, in replays of a CUDA graph, both sides in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from detinfer.bench import graph
from detinfer.bits import dtype_name, first_mismatch
from detinfer.errors import Diverged
from detinfer.ops import rows_cuda
from detinfer.ops.rows_proof import spread

SHAPES = (
    *((rows, n) for rows in (1, 16, 128, 1024, 16384) for n in (128, 1024, 4096, 8192)),
    *((rows, 152064) for rows in (1, 8, 64)),
)
"""(rows, elements of a row): hidden sizes, and logits."""

OPS = ("rms_norm", "layer_norm", "softmax", "log_softmax")
_COLD_BYTES = 130 << 20  # of inputs in one replay: twice the second cache
_MOST_CALLS = 24


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one call on both sides."""

    op: str
    dtype: torch.dtype
    rows: int
    n: int
    torch: float
    detinfer: float

    @property
    def ratio(self) -> float:
        """detinfer's time over torch's."""
        return self.detinfer / self.torch


def run(
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    repeats: int = 9,
) -> Iterator[Timing]:
    """Time every operation at every shape; Diverged where a row's bytes are not those of the row alone."""
    with torch.inference_mode():
        for dtype in dtypes:
            for rows, n in shapes:
                copies = max(2, min(_MOST_CALLS, _COLD_BYTES // (rows * n * dtype.itemsize)))
                some = spread(n, dtype, 3).cuda()
                inputs = [(some * (i + 1)).repeat((rows + 2) // 3, 1)[:rows].contiguous() for i in range(copies)]
                given = [(x,) for x in inputs]
                vectors = [some[0].clone(), some[1].clone()]
                for op in OPS:
                    ours, plain = _calls(op, n, vectors)
                    if first := first_mismatch(ours(inputs[0])[-1:].cpu(), ours(inputs[0][-1:].clone()).cpu()):
                        raise Diverged(f"{op} of {rows} x {n}, {dtype}: {first}")
                    yield Timing(op, dtype, rows, n, *(graph.median(call, given, repeats) for call in (plain, ours)))


def _calls(
    op: str, n: int, vectors: Sequence[torch.Tensor]
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """(detinfer's function, torch's)."""
    weight, bias = vectors
    if op == "rms_norm":
        return partial(rows_cuda.rms_norm, weight=weight, eps=1e-6), partial(
            F.rms_norm, normalized_shape=[n], weight=weight, eps=1e-6
        )
    if op == "layer_norm":
        return lambda x: rows_cuda.native_layer_norm(x, [n], weight, bias, 1e-5)[0], partial(
            F.layer_norm, normalized_shape=[n], weight=weight, bias=bias
        )
    if op == "softmax":
        return partial(rows_cuda.softmax, dim=-1), partial(torch.softmax, dim=-1)
    return partial(rows_cuda.log_softmax, dim=-1), partial(torch.log_softmax, dim=-1)


def to_json(timings: Sequence[Timing]) -> dict[str, Any]:
    """The timings in microseconds, with what they were made on."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "timings": [
            {
                "op": t.op,
                "dtype": dtype_name(t.dtype),
                "rows": t.rows,
                "elements": t.n,
                "torch_us": t.torch,
                "detinfer_us": t.detinfer,
                "ratio": t.ratio,
            }
            for t in timings
        ],
    }


def table(timings: Sequence[Timing]) -> Table:
    """The ratios, a line for each operation and row length, a column for each number of rows."""
    counts = sorted({t.rows for t in timings})
    shown = Table(title="rows, detinfer / torch, CUDA graph")
    for heading in ("operation", "dtype", "row"):
        shown.add_column(heading)
    for count in counts:
        shown.add_column(str(count), justify="right")
    for op, dtype, n in dict.fromkeys((t.op, t.dtype, t.n) for t in timings):
        by_rows = {t.rows: t for t in timings if (t.op, t.dtype, t.n) == (op, dtype, n)}
        cells = (f"{by_rows[count].ratio:.2f}" if count in by_rows else "" for count in counts)
        shown.add_row(op, dtype_name(dtype), str(n), *cells)
    return shown
