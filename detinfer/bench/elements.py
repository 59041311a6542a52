"""Elementwise functions, softmax, means and norms against torch's, both sides in turn in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.table import Table

from detinfer import threads as held
from detinfer.ops import elementwise, rows

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SHAPE = (512, 1536)
"""The hidden layer of SmolLM2-135M's MLP at 512 rows."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One operation on ``SHAPE``: the least seconds of both sides, which other load on the machine disturbs least."""

    op: str
    dtype: str
    threads: int
    torch: float
    detinfer: float

    @property
    def ratio(self) -> float:
        """detinfer's time over torch's."""
        return self.detinfer / self.torch


def calls(dtype: torch.dtype) -> dict[str, tuple[Call, Call]]:
    """Each operation as torch's call and detinfer's on the same tensors."""
    x = (torch.randint(-4000, 4000, SHAPE) / 1000).to(dtype)
    y, n = x.abs() + 0.01, SHAPE[1]
    w, b = (torch.randint(-128, 128, (n,)) / 64).to(dtype), torch.zeros(n, dtype=dtype)
    return {
        "silu": (lambda: F.silu(x), lambda: elementwise.silu(x)),
        "exp": (lambda: torch.exp(x), lambda: elementwise.exp(x)),
        "sigmoid": (lambda: torch.sigmoid(x), lambda: elementwise.sigmoid(x)),
        "gelu": (lambda: F.gelu(x), lambda: elementwise.gelu(x)),
        "gelu, tanh": (lambda: F.gelu(x, approximate="tanh"), lambda: elementwise.gelu(x, approximate="tanh")),
        "tanh": (lambda: torch.tanh(x), lambda: elementwise.tanh(x)),
        "erf": (lambda: torch.erf(x), lambda: elementwise.erf(x)),
        "log": (lambda: torch.log(y), lambda: elementwise.log(y)),
        "softplus": (lambda: F.softplus(x), lambda: elementwise.softplus(x)),
        "sin": (lambda: torch.sin(x), lambda: elementwise.sin(x)),
        "cos": (lambda: torch.cos(x), lambda: elementwise.cos(x)),
        "rsqrt": (lambda: torch.rsqrt(y), lambda: elementwise.rsqrt(y)),
        "pow 2": (lambda: x.pow(2), lambda: elementwise.pow_tensor_scalar(x, 2)),
        "pow 3": (lambda: x.pow(3), lambda: elementwise.pow_tensor_scalar(x, 3)),
        "pow 2.5": (lambda: y.pow(2.5), lambda: elementwise.pow_tensor_scalar(y, 2.5)),
        "softmax": (lambda: torch.softmax(x, -1), lambda: rows.softmax(x)),
        "log_softmax": (lambda: torch.log_softmax(x, -1), lambda: rows.log_softmax(x)),
        "mean": (lambda: x.mean(-1), lambda: rows.mean_dims(x, [-1])),
        "sum": (lambda: x.sum(-1), lambda: rows.sum_dims(x, [-1])),
        "sum of columns": (lambda: x.sum(0), lambda: rows.sum_dims(x, [0])),
        "rms_norm": (lambda: F.rms_norm(x, (n,), w, 1e-6), lambda: rows.rms_norm(x, w, 1e-6)),
        "layer_norm": (lambda: F.layer_norm(x, (n,), w, b), lambda: rows.native_layer_norm(x, [n], w, b, 1e-5)),
    }


def run(
    dtypes: Sequence[torch.dtype] = DTYPES, threads: int = 2, repeats: int = 60, only: Sequence[str] = ()
) -> Iterator[Timing]:
    """Time every operation (or those named in ``only``) in every dtype, ``repeats`` calls of each side in turn."""
    with held.threads(threads), torch.inference_mode():
        for dtype in dtypes:
            for op, pair in calls(dtype).items():
                if only and op not in only:
                    continue
                least = [float("inf"), float("inf")]
                for turn in range(repeats + 2):
                    for side, call in enumerate(pair):
                        start = time.perf_counter()
                        call()
                        took = time.perf_counter() - start
                        if turn >= 2:
                            least[side] = min(least[side], took)
                yield Timing(op, str(dtype).removeprefix("torch."), threads, *least)


def table(timings: Sequence[Timing]) -> Table:
    """The timings as a table for a terminal."""
    shown = Table(title=f"{SHAPE[0]} x {SHAPE[1]} elements, microseconds")
    for heading in ("operation", "dtype", "threads", "torch", "detinfer", "detinfer / torch"):
        shown.add_column(heading, justify="left" if heading in ("operation", "dtype") else "right")
    for t in timings:
        microseconds = (f"{t.torch * 1e6:.0f}", f"{t.detinfer * 1e6:.0f}", f"{t.ratio:.2f}")
        shown.add_row(t.op, t.dtype, str(t.threads), *microseconds)
    return shown
