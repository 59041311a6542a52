"""``detinfer diff``: what two recordings differ in, and where it begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli

PLANTS = Path(__file__).parent / "plants"


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built-in model, as it is, in other dtypes and prompts, and recorded by a process that a plant has got at."""
    folder = tmp_path_factory.mktemp("diff")
    recordings = {
        "sound": ["--n-prompts", "3"],
        "again": ["--n-prompts", "3", "--tensors", "none"],
        "short": ["--n-prompts", "2", "--decode-steps", "4"],
        "half": ["--n-prompts", "3", "--dtype", "bfloat16"],
        "few": ["--n-prompts", "3", "--layers", r"layers\.0"],
    }
    for name, options in recordings.items():
        assert cli.run(["record", "builtin:dense", "-o", str(folder / name), *options]) == 0
    command = [sys.executable, str(PLANTS / "scale_by_batch.py"), "record", "builtin:dense", "--n-prompts", "3"]
    subprocess.run([*command, "-o", str(folder / "planted")], check=True, env=dict(os.environ), capture_output=True)
    return {path.name: path for path in folder.iterdir()}


def diff(a: Path, b: Path, where: Path) -> tuple[int, dict[str, Any]]:
    code = cli.run(["diff", str(a), str(b), "--json", str(where / "diff.json")])
    return code, json.loads((where / "diff.json").read_text())


def test_two_recordings_of_the_same_are_the_same(goldens: dict[str, Path], tmp_path: Path) -> None:
    """Exit 0, every row compared, also where one of them holds digests alone."""
    code, found = diff(goldens["sound"], goldens["again"], tmp_path)
    assert (code, found["same"], found["first"]) == (0, True, None)
    assert {unit["state"] for unit in found["units"]} == {"same"}
    assert sum(unit["rows_compared"] for unit in found["units"]) > 1000
    assert found["environment"] == found["model"] == found["policy"] == found["tokens"] == []


def test_the_first_cause_is_where_inputs_agree(
    goldens: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first faulty layer leads; what follows it has only spread; the path that only one side took is listed."""
    code, found = diff(goldens["sound"], goldens["planted"], tmp_path)
    states = {unit["name"]: unit["state"] for unit in found["units"]}
    assert (code, found["first"]) == (1, "layers.0.self_attn.o_proj")
    assert states["layers.0.self_attn.q_proj"] == "same"
    assert states["layers.0.feed_forward.down_proj"] == "spread"
    assert states["head"] == "spread"
    assert any(name.startswith("aten::amax") for name, _, _ in found["policy"])
    unit = next(unit for unit in found["units"] if unit["name"] == found["first"])
    assert sum(unit["ulps"].values()) > 0
    out = capfd.readouterr().out
    assert "first cause layers.0.self_attn.o_proj" in out
    assert "request 0, prefill step 0, output" in out
    assert "DIFFERENT" in out


def test_other_inputs_and_dtypes_are_said(goldens: dict[str, Path], tmp_path: Path) -> None:
    """Inputs come before layers; a unit that one recording lacks is missing, not the same."""
    code, found = diff(goldens["sound"], goldens["short"], tmp_path)
    assert (code, found["inputs"]) == (1, ["3 and 2 prompts", "8 and 4 decode steps"])
    assert {unit["state"] for unit in found["units"]} == {"same"}
    code, found = diff(goldens["sound"], goldens["half"], tmp_path)
    assert code == 1
    assert ["dtype", "float32", "bfloat16"] in found["model"]
    code, found = diff(goldens["sound"], goldens["few"], tmp_path)
    states = {unit["name"]: unit["state"] for unit in found["units"]}
    assert (code, states["head"], states["layers.0"]) == (1, "missing", "same")


def test_a_folder_that_is_no_golden(goldens: dict[str, Path], tmp_path: Path) -> None:
    """Exit 4, as everywhere."""
    assert cli.run(["diff", str(goldens["sound"]), str(tmp_path)]) == 4
