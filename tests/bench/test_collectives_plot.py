"""``detinfer bench collectives-cuda --plot``: what it draws of given times, and what it says where it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from detinfer.bench.collectives_cuda import Timing
from detinfer.bench.collectives_plot import PANELS, plot
from detinfer.errors import UsageError

pytest.importorskip("matplotlib", reason="matplotlib, of the extras dev and plot, is not installed")

SIDES = {"detinfer": 3.0, "detinfer again": 3.1, "nccl": 8.0, "symm_mem one-shot": 6.0}


def _timings() -> list[Timing]:
    return [
        Timing(
            collective, f"{nbytes >> 10} KiB", nbytes, side, us * nbytes / 2048, us * nbytes / 2000, us * nbytes / 1900
        )
        for collective in (*PANELS, "eager", "copy")
        for nbytes in (2048, 4096, 65536)
        for side, us in SIDES.items()
    ]


def test_a_plot(tmp_path: Path) -> None:
    """Each panel and each side is named in it, the repetition is not, and the same times give the same file."""
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    plot(_timings(), 4, first)
    plot(_timings(), 4, second)
    text = first.read_text()
    assert text == second.read_text()
    for word in (*PANELS, "nccl", "symm_mem one-shot", "4 GPUs, CUDA-graph replay"):
        assert f">{word}</text>" in text or f">{word}, NVLink" in text, word
    assert "detinfer again" not in text
    plot(_timings(), 4, tmp_path / "third.png")
    assert (tmp_path / "third.png").read_bytes()[:4] == b"\x89PNG"


def test_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown suffix and a missing library are usage errors, and nothing is written."""
    with pytest.raises(UsageError, match=r"plot\.txt: the suffix says the format"):
        plot(_timings(), 2, tmp_path / "plot.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="extra plot"):
        plot(_timings(), 2, tmp_path / "plot.svg")
    assert list(tmp_path.iterdir()) == []
