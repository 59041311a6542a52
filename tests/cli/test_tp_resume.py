"""``verify --tp`` that is stopped and gone on with gives the result of one run, on every rank."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli

sys.path.append(str(Path(__file__).parent))
from tp_stops import done, record, result, stopped

OPTIONS = ("--n-trials", "6", "--control", "--axes", "batch,chunks,collectives")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("tp") / "golden")


@pytest.fixture(scope="module")
def wanted(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of one run that nothing stopped."""
    file = tmp_path_factory.mktemp("whole") / "whole.json"
    assert cli.run(["verify", str(golden), *OPTIONS, "--json", str(file)]) == 0
    return result(file)


@pytest.mark.parametrize(("stop", "code"), [("2:4:kill", 6), ("0:2:interrupt", 130), ("0:5:signal", 130)])
def test_a_stopped_run_goes_on_to_the_same_result(
    golden: Path, wanted: dict[str, Any], tmp_path: Path, stop: str, code: int
) -> None:
    """A rank dies, or is interrupted, half through a trial: what all had finished is kept, and nothing else."""
    file = tmp_path / "r.json"
    run = stopped(stop, "verify", str(golden), *OPTIONS, "--json", str(file))
    assert run.returncode == code, run.stderr
    assert f"--resume {file} goes on" in run.stderr.replace("\n", "")
    before = {"trial/0", "chunks/0", "collectives/0", *(f"trial/{n}" for n in range(1, int(stop.split(":")[1])))}
    assert done(file) == [before] * 3
    assert cli.run(["verify", "--resume", str(file), "--json", str(tmp_path / "b.json")]) == 0
    assert json.dumps(result(tmp_path / "b.json")) == json.dumps(wanted)
    assert wanted["consistency"]["tensors"] > 100 and wanted["unfinished"] is None


def test_ranks_that_stopped_at_different_trials(golden: Path, wanted: dict[str, Any], tmp_path: Path) -> None:
    """The run is taken up at the last trial that all had finished; the control's are kept apart from the others."""
    file = tmp_path / "r.json"
    stopped("1:5:kill", "verify", str(golden), *OPTIONS, "--json", str(file))
    held = json.loads(file.read_text())
    part = held["unfinished"]
    del part["others"][1]["trial/2"], part["others"][0]["trial/4"], part["others"][0]["trial/3"]
    file.write_text(json.dumps(held))
    stopped("2:4:kill", "verify", "--resume", str(file))
    assert done(file) == [{"trial/0", "trial/1", "trial/2", "trial/3", "chunks/0", "collectives/0"}] * 3
    assert cli.run(["verify", "--resume", str(file), "--json", str(file)]) == 0
    assert json.dumps(result(file)) == json.dumps(wanted)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_transformers_model(tmp_path: Path) -> None:
    """Recorded on one rank, verified on three by torchrun, stopped there, and gone on with by ``--tp``."""
    import tp_models

    target = tp_models.write(tmp_path / "llama")
    golden = tp_models.record(target, tmp_path / "golden")
    options = ("--tp", "3", "--n-trials", "3", "--axes", "batch")
    file = tmp_path / "r.json"
    assert cli.run(["verify", str(golden), *options, "--json", str(tmp_path / "whole.json")]) == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    run = stopped("1:1:kill", "verify", str(golden), *options, "--json", str(file), launcher=torchrun)
    assert run.returncode != 0 and "goes on" in run.stderr, run.stderr
    assert done(file) == [{"trial/0"}] * 3
    assert cli.run(["verify", "--resume", str(file), "--json", str(tmp_path / "b.json")]) == 0
    assert json.dumps(result(tmp_path / "b.json")) == json.dumps(result(tmp_path / "whole.json"))
