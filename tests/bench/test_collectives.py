"""``detinfer bench collectives``: it starts ranks, checks bytes before it times, and reports percentiles."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detinfer import cli
from detinfer.bench import collectives
from detinfer.collectives.stress import cancelling


def test_a_run(tmp_path: Path) -> None:
    """Two sizes between two ranks: ordered percentiles of both sides in the file."""
    report = tmp_path / "result.json"
    options = ["--ranks", "2", "--sizes", "64,8KiB", "--dtype", "bfloat16", "--seconds", "0.02", "--json", str(report)]
    assert cli.run(["bench", "collectives", *options]) == 0
    found = json.loads(report.read_text())["all_reduce"]
    assert [(t["ranks"], t["bytes"], t["dtype"]) for t in found] == [(2, 64, "bfloat16"), (2, 8192, "bfloat16")]
    for timing in found:
        for side in ("detinfer", "gloo"):
            assert 0 < timing[side]["p50_us"] <= timing[side]["p90_us"] <= timing[side]["p99_us"]


@pytest.mark.parametrize("turn", [0, 1])
def test_wrong_bytes_are_seen(turn: int) -> None:
    """The check before the timing passes sums in order of rank and fails sums that begin with another rank."""
    size, n = 3, 1000
    parts = cancelling(size, n, "float32")
    values = [torch.from_numpy(part.view("float32")) for part in parts]

    def all_reduce(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
        first, *rest = values[turn:] + values[:turn]
        for value in rest:
            first = first + value
        return first

    fake = SimpleNamespace(rank=0, size=size, all_reduce=all_reduce)
    assert collectives._check(fake, n, "float32") is (turn != 0)


def test_sizes_that_are_none() -> None:
    """A size that is no number is a usage error."""
    assert cli.run(["bench", "collectives", "--sizes", "1KB"]) == 2
