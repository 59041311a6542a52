"""``detinfer bench model --tp``: a model cut over GPUs, timed against NCCL's sums, its rows compared."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from detinfer import cli
from detinfer.bench import model_cuda, model_ranks
from detinfer.models.ranks import Ranks


class Three(Ranks):
    """Rank 0 of three, and what the others found."""

    size = 3

    def share(self, value: object, first: bool = False) -> list[object]:
        return [value, [(0, 3), (1, 2)], [(0, 1), (0, 4)]]


def test_the_worst_rank_counts() -> None:
    """A row that differs on any rank is one that differs."""
    checks = [model_cuda.Check("one", 8, 0, 2), model_cuda.Check("two", 8, 0, 2)]
    assert model_ranks.worst(checks, Three()) == [model_cuda.Check("one", 8, 0, 3), model_cuda.Check("two", 8, 1, 4)]


def test_on_the_cpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "model", "--tp", "2"]) == 2
    assert "bench model --tp is timed on GPUs: give --device cuda" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_over_two_gpus(tmp_path: Path) -> None:
    """Every case has both times; with the policy no row depends on its batch or on being decoded."""
    words = ["bench", "model", "qwen3-small", "--device", "cuda", "--tp", "2", "--repeats", "1"]
    assert cli.run([*words, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [t["case"] for t in found["timings"]] == [case.name for case in model_cuda.CASES]
    assert all(t["torch"] > 0 and t["detinfer"] > 0 for t in found["timings"])
    assert [c["differ"] for c in found["checks"]] == [0, 0, 0] and all(c["rows"] == 8 for c in found["checks"])
