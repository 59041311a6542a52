"""The first cause on another number of ranks: the layer, and whether it was the sum over ranks or what was added."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import cli

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
HERE = Path(__file__).parent
sys.path.append(str(HERE))
OUT, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded on one rank, of bits that are promised at every size."""
    import tp_models

    folder = tmp_path_factory.mktemp("tp")
    target = tp_models.write(folder / "llama", torch.float32)
    return tp_models.record(target, folder / "golden", "--policy", "tp", "--groups", "3")


@pytest.mark.parametrize(
    ("script", "fault", "path", "operation", "says"),
    [
        (
            HERE.parent / "goldens/wrong_ranks.py",
            "rotated",
            OUT,
            "detinfer::all_reduce.rank_tree",
            "the recorded bytes",
        ),
        (HERE / "odd_product.py", DOWN, DOWN, "aten::linear", "other bytes than were recorded"),
    ],
    ids=["a rotated sum", "a wrong product"],
)
def test_what_is_at_fault(
    script: Path,
    fault: str,
    path: str,
    operation: str,
    says: str,
    golden: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All ranks begin their sums at rank 1; one rank has a wrong weight."""
    report = tmp_path / "result.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    words = ["verify", str(golden), "--tp", "3", "--n-trials", "1", "--axes", "batch", "--json", str(report)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "FAULT": fault, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), *words], env=environment, capture_output=True, text=True, check=False
    )
    found: dict[str, Any] = json.loads(report.read_text())["golden"]
    assert done.returncode != 0 and found["verdict"] == "diverged", done.stderr
    assert found["first"]["unit"] == path and found["first"]["axis"] == "tp: 1 -> 3"
    cause = found["cause"]
    assert (cause["path"], cause["operation"]) == (path, operation), cause
    assert cause["inputs_differing"] == cause["inputs_unknown"] == [], (
        "each rank's share of its inputs is the recorded one"
    )
    assert says in cause["note"] and cause["got"] != cause["expected"] and cause["elements_differing"] > 0
    assert f"operation {operation} in {path}" in done.stdout
    assert cli.run(["locate", str(report)]) == 2
    assert f"is told again by: detinfer verify {golden}" in capfd.readouterr().err
