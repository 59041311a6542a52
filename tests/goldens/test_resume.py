"""A verification that is interrupted and gone on with gives the result of one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli
from detinfer.goldens import sweep

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def factories(monkeypatch: pytest.MonkeyPatch) -> None:
    """``faults:name`` is importable, also in processes that are started."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *(part for part in sys.path if part)]))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden of a language model: trials and axes."""
    path = tmp_path_factory.mktemp("goldens") / "dense"
    assert cli.run(["record", "builtin:dense", "-o", str(path), "--n-prompts", "2", "--decode-steps", "3"]) == 0
    return path


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden of a module that diverges in many trials."""
    path = tmp_path_factory.mktemp("goldens") / "faulty"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        assert cli.run(["record", "faults:linear_by_rows", "-o", str(path)]) == 0
    return path


def result(file: Path) -> dict[str, Any]:
    """What was saved, without the times."""
    held: dict[str, Any] = json.loads(file.read_text())
    del held["seconds"]
    return held


def whole(golden: Path, file: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code = cli.run(["verify", str(golden), *options, "--json", str(file)])
    return code, result(file)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, way: Callable[[], None]) -> None:
    """Interrupt as trial ``number`` has run half: what it found must be lost, not counted twice."""
    real = sweep.Sweep._judge

    def judge(self: sweep.Sweep, part: Any, trial: Any, *rest: Any) -> None:
        real(self, part, trial, *rest)
        if trial.number == number and len(part.tallies) > 2 and not hasattr(self, "interrupted"):
            self.interrupted = True  # type: ignore[attr-defined]
            way()

    monkeypatch.setattr(sweep.Sweep, "_judge", judge)


def raises() -> None:
    raise KeyboardInterrupt


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)


OPTIONS = ("--n-trials", "7", "--control", "--axes", "batch,chunks,prefix,threads")


@pytest.mark.parametrize(("number", "way"), [(0, raises), (4, sigterm), (6, raises)])
def test_an_interrupted_run_goes_on_to_the_same_result(
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
    way: Callable[[], None],
) -> None:
    """Every verdict, count and divergence is that of the run that nothing stopped, byte by byte but for the times."""
    code, wanted = whole(dense, tmp_path / "whole.json", *OPTIONS)
    with monkeypatch.context() as patch:
        interrupt_at(patch, number, way)
        assert cli.run(["verify", str(dense), *OPTIONS, "--json", str(tmp_path / "r.json")]) == 130
    assert f"--resume {tmp_path / 'r.json'}" in capfd.readouterr().err.replace("\n", "")
    part = result(tmp_path / "r.json")
    assert part["invariance"]["verdict"] == "not_run"
    assert sum(key.startswith("trial/") for key in part["unfinished"]["done"]) == number
    assert "interrupted after" in part["invariance"]["reasons"][0]
    assert cli.run(["verify", "--resume", str(tmp_path / "r.json"), "--json", str(tmp_path / "b.json")]) == code
    assert json.dumps(result(tmp_path / "b.json")) == json.dumps(wanted)
    assert wanted["unfinished"] is None


def test_what_was_done_is_not_run_again(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven trials two are left, and the first, which is traced in every run."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, raises)
        assert cli.run(["verify", str(dense), *OPTIONS, "--json", str(tmp_path / "r.json")]) == 130
    ran: list[int] = []
    real = sweep.Sweep.trial
    monkeypatch.setattr(sweep.Sweep, "trial", lambda self, trial: ran.append(trial.number) or real(self, trial))
    assert cli.run(["verify", "--resume", str(tmp_path / "r.json"), "--json", str(tmp_path / "b.json")]) == 0
    assert ran == [0, 5, 6, 0, 1, 2, 3], "then the control's"


def test_divergences_found_before_the_interruption_stay(
    faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cause and every divergence of a faulty layer are the same after two interruptions."""
    code, wanted = whole(faulty, tmp_path / "whole.json", "--n-trials", "12", "--control")
    assert (code, wanted["invariance"]["verdict"]) == (1, "diverged")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7, raises)
        options = ["--n-trials", "12", "--control", "--json", str(tmp_path / "r.json")]
        patch.setattr(sweep.Sweep, "trial", _stops(sweep.Sweep.trial, 7))
        assert cli.run(["verify", str(faulty), *options]) == 130
    assert result(tmp_path / "r.json")["invariance"]["verdict"] == "diverged"
    with monkeypatch.context() as patch:
        patch.setattr(sweep.Sweep, "trial", _stops(sweep.Sweep.trial, 10))
        assert cli.run(["verify", "--resume", str(tmp_path / "r.json")]) == 130
    assert len(result(tmp_path / "r.json")["unfinished"]["done"]) == 10
    assert cli.run(["verify", "--resume", str(tmp_path / "r.json"), "--json", str(tmp_path / "r.json")]) == 1
    assert result(tmp_path / "r.json") == wanted


def _stops(real: Any, number: int) -> Any:
    def trial(self: Any, trial: Any) -> Any:
        if trial.number == number:
            raise KeyboardInterrupt
        return real(self, trial)

    return trial


@pytest.fixture
def stopped(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of an interrupted run."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, raises)
        options = ["--n-trials", "4", "--axes", "batch", "--json", str(tmp_path / "r.json")]
        assert cli.run(["verify", str(dense), *options]) == 130
    return tmp_path / "r.json"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: held["unfinished"].update(golden="0" * 64), "another golden"),
        (lambda held: held["policy"].update(scope="run"), "another policy: scope"),
        (lambda held: held["environment"].update(torch="1.0"), "another environment: torch was 1.0"),
        (lambda held: held["environment"].update(native="other"), "another environment: native was other"),
        (lambda held: held["unfinished"].update(alone="0" * 64), "gives other bytes now"),
        (lambda held: held.update(unfinished=None), "not interrupted"),
        (lambda held: held["unfinished"]["options"].update(odd=1), "cannot be resumed"),
        (lambda held: held["unfinished"]["done"]["trial/1"].clear(), "cannot be read"),
        (lambda held: held.update(sweep=[1]), "damaged"),
        (lambda held: held.update(path=[1]), "damaged"),
        (lambda held: _first(held).update(rows_compared=1), "trial/0 finds"),
    ],
    ids=["golden", "policy", "torch", "native", "alone", "finished", "options", "part", "sweep", "path", "count"],
)
def test_a_result_of_another_run_is_refused_with_the_reason(
    stopped: Path, capfd: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    """Exit 4, and the file stays as it was."""
    held = json.loads(stopped.read_text())
    change(held)
    stopped.write_text(json.dumps(held))
    capfd.readouterr()
    code = cli.run(["verify", "--resume", str(stopped), "--json", str(stopped.with_name("new.json"))])
    error = capfd.readouterr().err
    assert code == 4
    assert says in error
    assert json.loads(stopped.read_text()) == held
    assert not stopped.with_name("new.json").exists()


def _first(held: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = held["unfinished"]["done"]["trial/0"]["trial"]["tallies"][0]
    return found


def test_options_of_the_run_cannot_be_given_again(stopped: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit 2: with others it would be another run."""
    assert cli.run(["verify", "--resume", str(stopped), "--n-trials", "9"]) == 2
    assert "--n-trials with --resume" in capfd.readouterr().err
    assert cli.run(["verify"]) == 2


def test_ctrl_c_of_a_real_process(faulty: Path, tmp_path: Path) -> None:
    """SIGINT while it runs: exit 130, a file in the working folder, and the same verdict after it is resumed."""
    code, wanted = whole(faulty, tmp_path / "whole.json", "--n-trials", "150")
    slow = (
        "import time, sys; from detinfer.goldens import sweep; real = sweep.Sweep.trial\n"
        "def trial(self, trial):\n    print('trial', trial.number, flush=True); time.sleep(0.02); return real(self, trial)\n"
        "sweep.Sweep.trial = trial\nfrom detinfer import cli; sys.exit(cli.run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, "verify", str(faulty), "--n-trials", "150"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "trial 20\n":
                process.send_signal(signal.SIGINT)
                break
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    file = tmp_path / "faulty.interrupted.json"
    assert 19 <= len(result(file)["unfinished"]["done"]) < 150
    assert cli.run(["verify", "--resume", str(file), "--json", str(tmp_path / "b.json")]) == code == 1
    assert result(tmp_path / "b.json") == wanted
