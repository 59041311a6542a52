"""The committed golden of builtin:moe on three ranks sees an order over ranks that nothing else sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.append(str(HERE))
import planted  # noqa: E402

ROOT = HERE.parents[1]
GOLDEN = "goldens/builtin_moe/tp3"


def verify(report: Path, script: list[str], **variables: str) -> tuple[int, str, dict[str, Any]]:
    command = [sys.executable, *script, "verify", GOLDEN, "--n-trials", "2", "--json", str(report)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, json.loads(report.read_text()) if report.exists() else {}


@pytest.mark.parametrize("ranks", [1, 3])
def test_it_is_made_of_portable_operations(ranks: int) -> None:
    """Every decision is portable, so that it is judged on every CPU; three terms or more in every sum over ranks."""
    held = json.loads((ROOT / f"goldens/builtin_moe/tp{ranks}/manifest.json").read_text())
    assert all(one["portable"] for one in held["decisions"])
    assert (held.get("ranks", 1), held["target"]["dtype"], held["tensors_mode"]) == (ranks, "float32", "full")
    assert held["reason"]


def test_it_verifies(tmp_path: Path) -> None:
    """All three verdicts; ``--tp`` need not be given."""
    report = tmp_path / "result.json"
    assert cli.run(["verify", str(ROOT / GOLDEN), "--n-trials", "2", "--json", str(report)]) == 0
    result = json.loads(report.read_text())
    assert [result[part]["verdict"] for part in ("invariance", "golden", "consistency")] == ["same"] * 3


@pytest.mark.parametrize("fault", ["rotated", "one"])
def test_a_rotated_order_is_caught_and_named(fault: str, tmp_path: Path) -> None:
    """Rows are batch-invariant all the same: the golden sees it, and the sum that is fused with a norm, whose path is sound.
    On one rank alone: the ranks disagree too."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(HERE / "wrong_ranks.py")]
    code, said, result = verify(tmp_path / "result.json", torchrun, FAULT=fault)
    assert code == 1, said
    invariance = result["invariance"]
    assert invariance["rows_differing"] == 0 and invariance["rows_compared"] > 0
    assert [axis["name"] for axis in invariance["axes"] if axis["verdict"] == "diverged"] == ["collectives"]
    assert result["golden"]["verdict"] == "diverged"
    first = result["golden"]["first"]
    assert (first["unit"], first["type"]) == ("layers.0.self_attn.all_reduce", "AllReduce")
    assert first["rank"] == (0 if fault == "rotated" else 2)
    consistency = result["consistency"]
    if fault == "rotated":
        assert (consistency["verdict"], consistency["differing"]) == ("same", 0)
    else:
        assert (consistency["verdict"], consistency["differing"]) == ("diverged", consistency["tensors"])
        assert "layers.0.self_attn.all_reduce: rank 2 holds other bytes than rank 0" in consistency["first"]


def test_a_faulty_kernel_is_refused_before_it_is_used(tmp_path: Path) -> None:
    """Its proof fails: exit 2, naming the operation and the place, and nothing is judged."""
    library = planted.build(tmp_path)
    code, said, result = verify(
        tmp_path / "result.json", ["-m", "detinfer"], PLANTED="rotated", DETINFER_NATIVE_LIBRARY=str(library)
    )
    assert (code, result) == (2, {})
    assert "detinfer::all_reduce is refused: its proof failed on this machine" in said
