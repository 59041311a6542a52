"""``detinfer bench compute``: its figures from timings."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from detinfer import cli, environment
from detinfer.bench import linear_cuda
from detinfer.bench.graph import geometric_mean
from detinfer.bench.linear_cuda import Timing, summary, table, to_json

TIMINGS = [
    Timing("a", "bfloat16", 64, 32, 1, 10.0, 5.0, 40.0),
    Timing("a", "bfloat16", 64, 32, 8, 10.0, 20.0, 10.0),
    Timing("a", "bfloat16", 96, 32, 1, 8.0, 8.0, None),
    Timing("a", "bfloat16", 96, 32, 8, 8.0, 8.0, None),
]


def test_figures() -> None:
    assert geometric_mean([0.5, 2.0, 1.0, 1.0]) == pytest.approx(1.0)
    text = summary(TIMINGS)
    assert "geometric mean 1.000; worst 2.00, 32 -> 64 at 8 rows (20.0 against 10.0 us)" in text
    assert "batch_invariant_ops: geometric mean 2.00, worst 4.00" in text
    assert "not installed" in summary(TIMINGS[2:])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(TIMINGS))
    shown = console.export_text()
    assert "32 -> 64" in shown and "0.50" in shown and "2.00" in shown


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpu", lambda: {"name": "a GPU"})
    data = json.loads(json.dumps(to_json(TIMINGS)))
    assert data["environment"] == {"name": "a GPU", "torch": torch.__version__}
    assert [timing["ratio"] for timing in data["timings"]] == [0.5, 2.0, 1.0, 1.0]


def test_rows_are_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(linear_cuda, "run", lambda *_: iter(TIMINGS))
    for rows in ("1,x", "0", "1,,2"):
        assert cli.run(["bench", "compute", "--rows", rows]) == 2
        assert "whole numbers above 0" in capsys.readouterr().err
    assert cli.run(["bench", "compute", "--rows", "1, 8"]) == 0
    assert "geometric mean 1.000" in capsys.readouterr().out
