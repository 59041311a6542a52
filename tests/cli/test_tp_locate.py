"""The first cause over ranks for a user: what ``verify`` prints, ``locate`` from the saved result, and a rank that dies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli

sys.path.append(str(Path(__file__).parent))
from tp_stops import environment, odd, record, stopped

OUT = "layers.0.self_attn.o_proj"
FAULT = f"product:{OUT}:2"
SWEEP = ("--n-trials", "1", "--axes", "batch", "--batch-sizes", "3")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """builtin:moe on three ranks."""
    return record(tmp_path_factory.mktemp("tp") / "golden")


@pytest.fixture(scope="module")
def result(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What verify wrote and printed where rank 2 adds its part of a sum otherwise in a batch."""
    file = tmp_path_factory.mktemp("result") / "result.json"
    done = odd(FAULT, "verify", str(golden), *SWEEP, "--json", str(file))
    assert done.returncode == 1, done.stderr
    return file, done.stdout


def test_verify_names_the_rank(result: tuple[Path, str]) -> None:
    """The others' sums differ because of it, and are not named."""
    file, out = result
    held: dict[str, Any] = json.loads(file.read_text())["invariance"]
    cause = held["cause"]
    assert (cause["path"], cause["operation"], cause["ranks"], held["first"]["unit"]) == (OUT, "aten::linear", [2], OUT)
    assert cause["batch"] == 2 and cause["got"] != cause["expected"] and cause["elements_differing"] > 0
    assert f"operation aten::linear in {OUT}, float32, on rank 2\n" in out


def test_locate_starts_the_ranks_of_the_result(result: tuple[Path, str], tmp_path: Path) -> None:
    """The same cause again, and a script from the rank that has the operation."""
    done = odd(FAULT, "locate", str(result[0]), "--script", str(tmp_path / "show"))
    assert done.returncode == 1, done.stderr
    assert done.stdout.count(f"operation aten::linear in {OUT}, float32, on rank 2\n") == 1
    script = tmp_path / "show" / "show.py"
    assert f"script: {script}" in done.stdout and len(script.read_text().splitlines()) < 50
    shown = subprocess.run([sys.executable, script], env=environment(""), capture_output=True, text=True, check=False)
    assert shown.returncode == 1 and "bytes that differ: 0" not in shown.stdout, shown.stderr


def test_under_torchrun_a_sound_model_has_no_cause(result: tuple[Path, str]) -> None:
    """Exit 0: the divergence did not show again."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    done = stopped("", "locate", str(result[0]), launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the divergence did not show again") == 1


def test_another_number_of_ranks_says_what_to_run(result: tuple[Path, str], capfd: pytest.CaptureFixture[str]) -> None:
    """Exit 2, before anything is started."""
    for count in ("1", "2"):
        assert cli.run(["locate", str(result[0]), "--tp", count]) == 2
        said = capfd.readouterr().err
        assert f"on 3 ranks and is searched for on as many, not on {count}: detinfer locate {result[0]} --tp 3" in said


def test_a_rank_that_dies_in_the_search_ends_it(golden: Path, tmp_path: Path) -> None:
    """Exit 6 with its number, and what was found until then is kept."""
    file = tmp_path / "result.json"
    done = odd(FAULT, "verify", str(golden), *SWEEP, "--json", str(file), DIES="1")
    assert done.returncode == 6, done.stderr
    assert "rank 1 of 3 was killed by SIGKILL" in done.stderr and f"--resume {file} goes on" in done.stderr
    held = json.loads(file.read_text())
    assert held["unfinished"]["done"].keys() == {"trial/0"} and held["invariance"]["cause"] is None
