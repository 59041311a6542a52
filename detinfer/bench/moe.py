"""A mixture of experts on several ranks: how many collectives a layer makes and how long a prefill takes, way by way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from detinfer.errors import UsageError
from detinfer.models import builtin
from detinfer.models.builtin import Communication
from detinfer.policy import deterministic

LENGTH = 128
WAYS = {
    "separate": Communication("separate"),
    "merged": Communication(),
    "merged, carried": Communication(communicator=True),
    "merged, carried and scattered": Communication(communicator=True, allow_reduce_scatter=True),
}
KINDS = ("moe", "moe", "moe", "moe")


@dataclass(frozen=True)
class Timing:
    """One way on rank 0: collectives a layer, median milliseconds of a prefill, and its share of the separate way's.

    ``ratio`` is the median over neighbouring passes; ``same`` says whether the logits have the bytes of ``merged``.
    """

    way: str
    collectives: float
    milliseconds: float
    ratio: float
    same: bool


def run(ranks: int, rows: int, repeats: int) -> list[Timing]:
    """Time every way between ``ranks`` processes. UsageError for fewer than two."""
    from detinfer.collectives.launch import Left, launch

    if ranks < 2 or repeats < 1 or rows < 1:
        raise UsageError(f"bench moe: {ranks} ranks, {rows} rows, {repeats} repeats: at least 2, 1 and 1")
    found = launch(_rank, ranks, rows, repeats, preload=("detinfer.bench.moe",))
    if isinstance(found, Left):
        raise UsageError(f"rank {found.rank} ended with exit code {found.code}")
    timings: list[Timing] = found[0]
    return timings


def _rank(rows: int, repeats: int) -> list[Timing]:
    from detinfer.collectives.launch import join, place
    from detinfer.models.ranks import Spread

    mine = place()
    assert mine is not None
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(0, builtin.VOCABULARY, (rows, LENGTH)))
    with join(mine) as communicator, torch.inference_mode():
        counted = _Counted(communicator)
        everyone = Spread(counted)  # type: ignore[arg-type]
        models = {way: builtin.layers(KINDS, torch.bfloat16, 0, everyone, how) for way, how in WAYS.items()}
        seconds: dict[str, list[float]] = {way: [] for way in models}
        logits: dict[str, bytes] = {}
        collectives: dict[str, float] = {}
        with deterministic("batch", uncovered="trust"):
            for way, model in models.items():
                model(ids)  # proves
                counted.calls = 0
                found = model(ids).logits
                collectives[way] = counted.calls / len(KINDS)
                logits[way] = found.view(torch.uint8).numpy().tobytes()
            for _ in range(repeats):
                for way, model in models.items():
                    communicator.barrier()
                    start = time.perf_counter()
                    model(ids)
                    seconds[way].append(time.perf_counter() - start)
    return [
        Timing(
            way,
            collectives[way],
            statistics.median(seconds[way]) * 1e3,
            statistics.median(a / b for a, b in zip(seconds[way], seconds["separate"], strict=True)),
            logits[way] == logits["merged"],
        )
        for way in models
    ]


class _Counted:
    """A communicator that counts what the layers ask of it; the gather of the logits is not a layer's."""

    def __init__(self, communicator: Any) -> None:
        self._communicator, self.calls = communicator, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._communicator, name)

    def all_reduce(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self._communicator.all_reduce(*arguments, **options)

    def all_reduce_rms_norm(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self._communicator.all_reduce_rms_norm(*arguments, **options)

    def reduce_scatter(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self._communicator.reduce_scatter(*arguments, **options)


def table(timings: Sequence[Timing]) -> Table:
    """The timings as a table for a terminal."""
    shown = Table(title=f"{len(KINDS)} mixture-of-experts layers, bfloat16, prefill of prompts of {LENGTH} tokens")
    for heading in ("reductions", "sums a layer", "ms", "of separate", "bytes of merged"):
        shown.add_column(heading, justify="left" if heading in ("reductions", "bytes of merged") else "right")
    for t in timings:
        shown.add_row(
            t.way, f"{t.collectives:g}", f"{t.milliseconds:.1f}", f"{t.ratio:.2f}", "the same" if t.same else "others"
        )
    return shown
