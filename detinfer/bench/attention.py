"""Attention against torch's, both sides in turn in one run, through the policy as a model calls it.

The shapes are SmolLM2-135M's: 9 query heads on 3 heads of K and V, depth 64. Without padding, transformers asks for
``enable_gqa`` (and ``is_causal`` in prefill); with padding it passes a bool mask, on repeated K and V in prefill and
with the heads of a group packed as query rows in decode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from detinfer import threads as held
from detinfer.policy import deterministic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    *((8, 64, 64), (64, 16, 16), (1, 1024, 1024)),
    *((1, 1, 17), (1, 1, 128), (1, 1, 1024), (8, 1, 17), (8, 1, 1024), (64, 1, 17), (64, 1, 128), (64, 1, 1024)),
)
"""(batch, query rows, keys): prefill, then decode."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One call: the least seconds of both sides, which other load on the machine disturbs least."""

    dtype: str
    shape: tuple[int, int, int]
    masked: bool
    threads: int
    torch: float
    detinfer: float

    @property
    def ratio(self) -> float:
        """detinfer's time over torch's."""
        return self.detinfer / self.torch


def run(
    dtypes: Sequence[torch.dtype] = DTYPES, threads: int = 2, repeats: int = 7, seconds: float = 0.02
) -> Iterator[Timing]:
    """Time every shape with and without a mask; each of ``repeats`` turns calls one side for about ``seconds``."""
    with held.threads(threads), torch.inference_mode():
        for dtype in dtypes:
            for shape in SHAPES:
                for masked in (False, True):
                    call = _prepare(*shape, masked, dtype)
                    plain = ours = float("inf")
                    for _ in range(repeats):
                        plain = min(plain, _least(call, seconds))
                        with deterministic("batch", uncovered="trust"):
                            ours = min(ours, _least(call, seconds))
                    yield Timing(str(dtype).removeprefix("torch."), shape, masked, threads, plain, ours)


def _prepare(batch: int, queries: int, keys: int, masked: bool, dtype: torch.dtype) -> Call:
    def integers(*shape: int) -> torch.Tensor:
        return (torch.randint(-(2**20), 2**20, shape) / 2**19).to(dtype)

    query = integers(batch, queries, 9, 64).transpose(1, 2)
    key, value = integers(batch, 3, keys, 64), integers(batch, 3, keys, 64)
    if not masked:
        return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=queries > 1, enable_gqa=True)
    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    if queries == 1:
        packed = query.reshape(batch, 3, 3, 64)
        return lambda: F.scaled_dot_product_attention(packed, key, value, attn_mask=mask)
    wide_key, wide_value = key.repeat_interleave(3, dim=1), value.repeat_interleave(3, dim=1)
    return lambda: F.scaled_dot_product_attention(query, wide_key, wide_value, attn_mask=mask)


def _least(call: Call, seconds: float) -> float:
    """Least seconds of a call among as many as fit into ``seconds``, at least three."""
    call()
    least, used, count = float("inf"), 0.0, 0
    while count < 3 or used < seconds:
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        least, used, count = min(least, took), used + took, count + 1
    return least


def table(timings: Sequence[Timing]) -> Table:
    """The timings as a table for a terminal."""
    threads = sorted({t.threads for t in timings})
    shown = Table(title=f"attention, 9 heads on 3, depth 64, {', '.join(map(str, threads))} threads, microseconds")
    for heading in ("dtype", "batch", "rows", "keys", "mask", "torch", "detinfer", "detinfer / torch"):
        shown.add_column(heading, justify="left" if heading in ("dtype", "mask") else "right")
    for t in timings:
        microseconds = (f"{t.torch * 1e6:.1f}", f"{t.detinfer * 1e6:.1f}", f"{t.ratio:.2f}")
        shown.add_row(t.dtype, *map(str, t.shape), "bool" if t.masked else "", *microseconds)
    return shown


def to_json(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """The timings for a file, in seconds."""
    return [{**asdict(t), "ratio": t.ratio} for t in timings]
