"""Linear layers on a GPU against torch's default and others, in replays of a CUDA graph, all sides in one run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table

from detinfer import environment
from detinfer.bench import graph
from detinfer.bench.graph import geometric_mean
from detinfer.bits import dtype_name, first_mismatch
from detinfer.errors import Diverged
from detinfer.ops.matmul_cuda import linear
from detinfer.ops.matmul_cuda_proof import operands, prove_shape

SHAPES = {
    "Qwen3-8B": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
    "Llama-3-70B, TP 8": ((1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)),
    "gpt-oss": ((5120, 2880), (2880, 4096)),
}
"""(N, K) of the layers of each model."""

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
_COLD_BYTES = 260 << 20  # of weights in one replay: several times the second cache
_MANY = 2048  # rows from which two weights are enough

Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one product by each side; None where a side is not installed or does not take it."""

    model: str
    dtype: str
    n: int
    k: int
    rows: int
    torch: float
    detinfer: float
    batch_invariant_ops: float | None

    @property
    def ratio(self) -> float:
        """detinfer's time over torch's."""
        return self.detinfer / self.torch


def run(rows: Sequence[int], repeats: int, dtype: torch.dtype) -> Iterator[Timing]:
    """Prove every shape, then time it at each number of rows, TF32 off.

    Before a product is timed, its first 64 rows are compared with the plain kernel's on inputs in which an order shows:
    a difference raises Diverged. Thinking Machines' batch_invariant_ops is timed where it is installed.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    other = _batch_invariant_ops() if dtype is not torch.float32 else None
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode():
            for model, shapes in SHAPES.items():
                for n, k in shapes:
                    prove_shape(n, k, dtype, device)
                    x, w = operands(max(rows), n, k, dtype, device)
                    copies = max(2, min(12, _COLD_BYTES // (n * k * dtype.itemsize)))
                    weights = [w, *(w.clone() for _ in range(copies - 1))]
                    for count in rows:
                        part, used = x[:count], weights if count < _MANY else weights[:2]
                        head = linear(part[:64], w, path="reference")
                        if first := first_mismatch(linear(part, w)[:64], head):
                            raise Diverged(f"linear of {count} x {k} x {n} in {dtype_name(dtype)}: {first}")
                        ours, default = _sides(part, used, repeats)
                        peer = (
                            None
                            if other is None
                            else graph.median(partial(other, part), [(weight,) for weight in used], repeats)
                        )
                        yield Timing(model, dtype_name(dtype), n, k, count, default, ours, peer)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def _sides(x: torch.Tensor, weights: Sequence[torch.Tensor], repeats: int) -> tuple[float, float]:
    """detinfer's and torch's time, each the lesser of two medians, measured in turn: ours, torch's, torch's, ours."""
    ours, default = partial(linear, x), partial(torch.nn.functional.linear, x)
    each = [(weight,) for weight in weights]
    first, plain, again, last = (graph.median(call, each, repeats) for call in (ours, default, default, ours))
    return min(first, last), min(plain, again)


def _batch_invariant_ops() -> Call | None:
    try:
        persistent: Any = importlib.import_module("batch_invariant_ops").matmul_persistent
    except ImportError:
        return None
    return lambda x, weight: persistent(x, weight.t())


def table(timings: Sequence[Timing]) -> Table:
    """The ratios, a line for each shape and a column for each number of rows."""
    rows = sorted({t.rows for t in timings})
    shown = Table(title=f"{timings[0].dtype} linear, detinfer / torch, CUDA graph")
    shown.add_column("K -> N")
    for count in rows:
        shown.add_column(str(count), justify="right")
    for n, k in dict.fromkeys((t.n, t.k) for t in timings):
        by_rows = {t.rows: t for t in timings if (t.n, t.k) == (n, k)}
        shown.add_row(f"{k} -> {n}", *(f"{by_rows[count].ratio:.2f}" for count in rows))
    return shown


def summary(timings: Sequence[Timing]) -> str:
    """The geometric mean and the worst point, of detinfer and of batch_invariant_ops where that was timed."""
    worst = max(timings, key=lambda timing: timing.ratio)
    text = (
        f"geometric mean {geometric_mean([t.ratio for t in timings]):.3f}; worst {worst.ratio:.2f}, {worst.k} -> {worst.n} at "
        f"{worst.rows} rows ({worst.detinfer:.1f} against {worst.torch:.1f} us)"
    )
    others = [t.batch_invariant_ops / t.torch for t in timings if t.batch_invariant_ops is not None]
    if not others:
        return f"{text}; batch_invariant_ops is not installed, or not for this dtype"
    return f"{text}; batch_invariant_ops: geometric mean {geometric_mean(others):.2f}, worst {max(others):.2f}"


def to_json(timings: Sequence[Timing]) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "environment": environment.gpu() | {"torch": torch.__version__},
        "geometric_mean": geometric_mean([t.ratio for t in timings]),
        "timings": [asdict(timing) | {"ratio": timing.ratio} for timing in timings],
    }
