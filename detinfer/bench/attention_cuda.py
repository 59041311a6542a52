"""Attention on a GPU against the backends of torch's scaled_dot_product_attention, in replays of a CUDA graph, in one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from detinfer.bench import graph
from detinfer.bits import first_mismatch
from detinfer.errors import Diverged
from detinfer.ops.attention_cuda import reference, scaled_dot_product_attention

DECODE = tuple((batch, 1, keys) for keys in (1024, 4096, 8192, 65536) for batch in (1, 8, 64))
PREFILL = ((8, 1024, 1024), (4, 2048, 2048), (2, 4096, 4096), (1, 8192, 8192), (1, 16384, 16384))
"""(batch, query rows, keys)."""

GROUPS = (4, 8)
"""Query heads on each head of K and V; there are 8 of those, of depth 128."""

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
"""torch's backends that take grouped heads without copies of K and V."""

_COLD_BYTES = 300 << 20  # of keys and values in one replay of decode: several times the second cache

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, of detinfer and of each backend that took it: the lesser of two medians."""

    shape: tuple[int, int, int]
    group: int
    detinfer: float
    backends: dict[str, float]

    @property
    def ratio(self) -> float:
        """detinfer's time over the fastest backend's."""
        return self.detinfer / min(self.backends.values())

    @property
    def teraflops(self) -> float:
        """Of detinfer, 10^12 a second, counting the keys that a row sees."""
        batch, queries, keys = self.shape
        pairs = queries * keys if queries == 1 else queries * (queries + 1) // 2
        return 4.0 * batch * 8 * self.group * 128 * pairs / self.detinfer / 1e6


def run(
    shapes: Sequence[tuple[int, int, int]] = DECODE + PREFILL, groups: Sequence[int] = GROUPS, repeats: int = 7
) -> Iterator[Timing]:
    """Time every shape in bf16; rows of each are compared with the plain kernel first, a difference raises Diverged."""
    with torch.inference_mode():
        for group in groups:
            for shape in shapes:
                yield _time(shape, group, repeats)


def _time(shape: tuple[int, int, int], group: int, repeats: int) -> Timing:
    batch, queries, keys = shape
    causal = queries > 1
    copies = 2 if causal else max(2, min(16, _COLD_BYTES // (batch * keys * 8 * 128 * 4)))
    if batch * keys * 8 * 128 * 4 > 8 << 30:
        copies = 1  # as large as many caches by itself
    inputs = [_inputs(shape, group) for _ in range(copies)]

    def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return scaled_dot_product_attention(query, key, value, None, 0.0, causal, enable_gqa=True)

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    _check(inputs[0], ours, causal)
    mine, times = math.inf, dict[str, float]()
    for _ in range(2):  # in turn: under load a GPU lowers its clock, and who comes last would have the lowest
        mine = min(mine, graph.median(ours, inputs, repeats))
        for backend in BACKENDS:
            name = backend.name.removesuffix("_ATTENTION").lower()
            if (found := _backend(plain, backend, inputs, repeats)) is not None:
                times[name] = min(found, times.get(name, found))
    return Timing(shape, group, mine, times)


def _backend(call: Attention, backend: SDPBackend, inputs: Sequence[Inputs], repeats: int) -> float | None:
    """Microseconds of torch's call held to one backend; None where it does not take these shapes."""
    try:
        with sdpa_kernel(backend):
            return graph.median(call, inputs, repeats)
    except RuntimeError:  # torch's way of saying so
        torch.cuda.synchronize()
        return None


def _inputs(shape: tuple[int, int, int], group: int) -> Inputs:
    batch, queries, keys = shape
    sizes = ((batch, 8 * group, queries, 128), (batch, 8, keys, 128), (batch, 8, keys, 128))
    query, key, value = (torch.empty(size, dtype=torch.bfloat16, device="cuda").normal_() for size in sizes)
    return query, key, value


def _check(inputs: Inputs, ours: Attention, causal: bool) -> None:
    """Compare the last row of the first sequence with the plain kernel."""
    query, key, value = (t[:1] for t in inputs)
    expected = reference(query[:, :, -1:], key, value)
    if first := first_mismatch(ours(*inputs)[:1, :, -1:].cpu(), expected.cpu()):
        raise Diverged(f"attention of {list(query.shape)} on {key.shape[2]} keys{' causal' * causal}: {first}")


def table(timings: Sequence[Timing]) -> Table:
    """The timings as a table for a terminal."""
    names = sorted({name for t in timings for name in t.backends})
    shown = Table(title="bf16 attention, 8 heads of K and V of depth 128, CUDA graph, microseconds")
    for heading in ("batch", "rows", "keys", "group", *names, "detinfer", "detinfer / best", "TFLOP/s"):
        shown.add_column(heading, justify="right")
    for t in timings:
        sides = (f"{t.backends[name]:.1f}" if name in t.backends else "-" for name in names)
        rate = f"{t.teraflops:.0f}" if t.shape[1] > 1 else ""
        shown.add_row(*map(str, t.shape), str(t.group), *sides, f"{t.detinfer:.1f}", f"{t.ratio:.2f}", rate)
    return shown


def to_json(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """The timings for a file."""
    return [{**asdict(t), "ratio": t.ratio} for t in timings]
