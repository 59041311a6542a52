"""A mixture of experts of transformers under scope ``tp``: recorded on one rank, verified on three."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
HERE = Path(__file__).parent
sys.path.append(str(HERE))
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded on one rank, in groups that three can share."""
    import tp_models

    folder = tmp_path_factory.mktemp("tp")
    target = tp_models.write_experts(folder / "experts")
    return tp_models.record(target, folder / "golden", "--policy", "tp", "--groups", "3")


def test_three_ranks_have_the_recorded_bytes(golden: Path, tmp_path: Path) -> None:
    """Every row of every module, and rows in batches; a rank's sum begun elsewhere shows."""
    import tp_models

    code, result = tp_models.verified(golden, tmp_path / "result.json", "--tp", "3")
    assert code == 0
    assert result["golden"]["verdict"] == result["invariance"]["verdict"] == "same"
    assert result["golden"]["rows_compared"] > 1000
    assert not any("not compared" in reason for reason in result["golden"]["reasons"])
    consistency = result["consistency"]
    assert (consistency["verdict"], consistency["ranks"], consistency["differing"]) == ("same", 3, 0)
    seen = {probe["operation"]: probe["seen"] for probe in result["invariance"]["sensitivity"]}
    assert seen["detinfer::all_reduce"]


def test_a_wrong_weight_of_one_rank_is_found(golden: Path, tmp_path: Path) -> None:
    """One element of one rank's down projections: the first that differs is the layer, which experts are recorded with."""
    report = tmp_path / "result.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    words = ["verify", str(golden), "--tp", "3", "--n-trials", "1", "--axes", "batch", "--json", str(report)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "FAULT": f"{LAYER}.mlp.experts"}
    done = subprocess.run(
        [sys.executable, *torchrun, str(HERE / "odd_product.py"), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(report.read_text())["golden"]
    assert done.returncode != 0 and found["verdict"] == "diverged", done.stderr
    cause = found["cause"]
    assert (found["first"]["unit"], cause["path"], cause["inputs_differing"]) == (LAYER, LAYER, []), cause
