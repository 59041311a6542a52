"""``verify --tp`` that is stopped: Ctrl-C, and files that cannot be gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli
from detinfer.errors import GoldenError
from detinfer.goldens.ledger import Ledger
from detinfer.models.ranks import Pretended

sys.path.append(str(Path(__file__).parent))
from tp_stops import done, environment, record, result, stopped

TRIALS = 12


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("tp") / "golden")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGINT to another process")
@pytest.mark.parametrize(
    ("number", "group", "code"),
    [(signal.SIGINT, False, 130), (signal.SIGINT, True, 130), (signal.SIGTERM, False, 6), (signal.SIGKILL, False, -9)],
    ids=["the command", "the terminal's group", "SIGTERM", "SIGKILL"],
)
def test_a_signal(golden: Path, tmp_path: Path, number: signal.Signals, group: bool, code: int) -> None:
    """Of the command alone, and of all its processes at once, as a terminal sends it: what was found is in a file."""
    words = ("verify", str(golden), "--n-trials", str(TRIALS), "--axes", "batch")
    command = [sys.executable, "-m", "detinfer", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment("say"),
        start_new_session=True,
        **pipes,  # type: ignore[call-overload]
    ) as process:
        for line in process.stdout:
            if line == "trial 5\n":
                (os.killpg if group else os.kill)(process.pid, number)
                break
        _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert error.count("goes on") == 1 and error.count("interrupted\n") == (code == 130), error
    file = tmp_path / "golden.interrupted.json"
    columns = done(file)
    assert columns[0] == columns[1] == columns[2] and 5 <= len(columns[0]) < TRIALS
    if number == signal.SIGINT and not group:  # the same file either way
        assert cli.run(["verify", "--resume", str(file), "--json", str(tmp_path / "b.json")]) == 0
        assert cli.run([*words, "--json", str(tmp_path / "whole.json")]) == 0
        assert result(tmp_path / "b.json") == result(tmp_path / "whole.json")


@pytest.fixture(scope="module")
def partial(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run that was stopped."""
    file = tmp_path_factory.mktemp("partial") / "r.json"
    stopped("1:3:kill", "verify", str(golden), "--n-trials", "4", "--axes", "batch", "--json", str(file))
    return file


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (
            lambda part: part["others"][1]["trial/0"]["trial"]["tallies"][0].update(rows_compared=1),
            (),
            "rank 2: trial/0",
        ),
        (lambda part: None, ("--tp", "2"), "this run is on 2, the interrupted one was on 3 ranks; give --tp 3"),
    ],
    ids=["count", "other ranks"],
)
def test_a_foreign_or_changed_file_is_refused(
    partial: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], Any],
    options: tuple[str, ...],
    says: str,
) -> None:
    """Exit 4, said once, and the file stays as it was."""
    held = json.loads(partial.read_text())
    change(held["unfinished"])
    file = tmp_path / "r.json"
    file.write_text(json.dumps(held))
    run = stopped("", "verify", "--resume", str(file), *options)
    assert run.returncode == 4
    assert says in run.stderr and run.stderr.count("error: ") == 1, run.stderr
    assert json.loads(file.read_text()) == held


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda part: part["others"].pop(), "the run was on 2 ranks, this one is on 3 ranks"),
        (lambda part: part["others"].clear(), "the run was on 1 rank, this one is on 3 ranks"),
        (lambda part: part["sums"].pop("trial/1"), "does not say what ranks compared"),
        (lambda part: part["sums"]["trial/1"].update(odd=1), "does not say what ranks compared"),
        (lambda part: part["others"][0]["trial/1"].clear(), "cannot be read"),
    ],
    ids=["a rank", "one rank", "no sums", "odd sums", "part"],
)
def test_what_a_file_must_hold(partial: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    """Of every rank as much, and what the ranks had compared; the file as it was written can be read."""
    held = json.loads(partial.read_text())
    Ledger(Pretended(1, 3), held)
    change(held["unfinished"])
    with pytest.raises(GoldenError, match=says):
        Ledger(Pretended(1, 3), held)


def test_jobs_and_ranks_are_told_apart(partial: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A job holds a whole model: exit 2."""
    assert cli.run(["verify", "--resume", str(partial), "--tp", "3", "--jobs", "2"]) == 2
    assert "jobs hold a whole model each, ranks one together" in capfd.readouterr().err
