"""Trials shared out over processes: the result of one process, and a process that dies is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import cli
from detinfer.cli.jobs import check
from detinfer.errors import InfrastructureError, UsageError
from detinfer.goldens import jobs
from detinfer.goldens.sweep import Swept
from detinfer.goldens.tasks import Done, Task

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def factories(monkeypatch: pytest.MonkeyPatch) -> None:
    """``faults:name`` is importable, also in processes that are started."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *(part for part in sys.path if part)]))


def result(file: Path) -> dict[str, Any]:
    """What was saved, without the times."""
    held: dict[str, Any] = json.loads(file.read_text())
    del held["seconds"]
    return held


def both(golden: Path, where: Path, *options: str) -> list[tuple[int, str]]:
    """Exit code and result of one process and of three."""
    found = []
    for more in ((), ("--jobs", "3")):
        code = cli.run(["verify", str(golden), *options, *more, "--json", str(where / "r.json")])
        found.append((code, json.dumps(result(where / "r.json"))))
    return found


def test_three_jobs_find_what_one_finds(tmp_path: Path) -> None:
    """Trials, axes and control of a language model, in three processes: the same result, byte by byte but for the times."""
    golden = tmp_path / "dense"
    assert cli.run(["record", "builtin:dense", "-o", str(golden), "--n-prompts", "2", "--decode-steps", "3"]) == 0
    one, three = both(golden, tmp_path, "--n-trials", "6", "--control", "--axes", "batch,chunks,threads")
    assert one == three
    assert one[0] == 0


@pytest.mark.parametrize("options", [(), ("--fail-fast",)], ids=["all", "fail-fast"])
def test_divergences_are_in_the_order_of_trials(options: tuple[str, ...], tmp_path: Path) -> None:
    """Also where the sweep stops at the first trial that diverges, whoever ran the ones after it."""
    golden = tmp_path / "faulty"
    assert cli.run(["record", "faults:linear_by_rows", "-o", str(golden)]) == 0
    one, three = both(golden, tmp_path, "--n-trials", "12", *options)
    assert one == three
    assert one[0] == 1
    numbers = [found["trial"] for found in json.loads(one[1])["invariance"]["divergences"]]
    assert numbers == sorted(numbers)


def pool(work: Any, count: int = 2) -> tuple[jobs.Pool, list[Any]]:
    """A pool whose workers run ``work(connection)``."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    workers = []
    for number in range(1, count + 1):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, here), daemon=True)
        process.start()
        there.close()
        workers.append(jobs.Worker(f"job {number} of {count + 1}", here, process))
    return jobs.Pool(workers, torch.get_num_threads()), workers


def _dies(connection: Any, other: Any) -> None:
    other.close()
    connection.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def _other_bytes(connection: Any, other: Any) -> None:
    other.close()
    while True:
        connection.recv()
        connection.send((Swept(), "other"))


def _raises(connection: Any, other: Any) -> None:
    other.close()
    connection.recv()
    connection.send(InfrastructureError("the disk is full"))


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (_dies, r"job [12] of 3: process \d+ was killed by SIGKILL, while it ran trial/\d"),
        (_other_bytes, r"job [12] of 3: alone, the model gives other bytes"),
        (_raises, "the disk is full"),
    ],
)
def test_a_worker_that_fails_is_named(work: Any, says: str) -> None:
    """Its error ends the verification; the parts that were found stay, for an interrupted result."""
    import time

    held, workers = pool(work)
    done: Done = {}

    def run(task: Task) -> Swept:
        time.sleep(0.05)
        return Swept()

    try:
        with pytest.raises(Exception, match=says):
            held.run([Task(number) for number in range(200)], run, done, False, lambda number: None)
    finally:
        held.close()
    assert len(done) < 150, "it went on to the end although a worker had failed"
    assert not any(worker.process.is_alive() for worker in workers)


KILLED = """
import os, signal, sys
from detinfer.goldens import jobs
if __name__ != "__main__":
    def run(self, task):
        os.kill(os.getpid(), signal.SIGKILL)
    jobs._Own.run = run
else:
    import time
    from detinfer import cli
    from detinfer.goldens import sweep
    real = sweep.Sweep.trial
    sweep.Sweep.trial = lambda self, trial: time.sleep(0.3) or real(self, trial)  # until the other has loaded
    sys.exit(cli.run(sys.argv[1:]))
"""


def test_a_killed_process_ends_the_command(tmp_path: Path) -> None:
    """Exit 6, the process and its trial in the message; what was found is kept, and gone on with by one process."""
    golden = tmp_path / "sound"
    assert cli.run(["record", "faults:sound", "-o", str(golden)]) == 0
    script = tmp_path / "killed.py"  # a process that is started imports it under another name, and is killed there
    script.write_text(KILLED)
    command = [
        sys.executable,
        str(script),
        "verify",
        str(golden),
        "--jobs",
        "2",
        "--n-trials",
        "150",
        "--json",
        "r.json",
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 6, ended.stderr
    assert "error: job 1 of 2: process" in ended.stderr
    assert "was killed by SIGKILL, while it ran trial/" in ended.stderr
    assert "--resume r.json goes on" in ended.stderr
    assert len(result(tmp_path / "r.json")["unfinished"]["done"]) < 150
    assert cli.run(["verify", "--resume", str(tmp_path / "r.json"), "--json", str(tmp_path / "b.json")]) == 0
    assert cli.run(["verify", str(golden), "--n-trials", "150", "--json", str(tmp_path / "whole.json")]) == 0
    assert result(tmp_path / "b.json") == result(tmp_path / "whole.json")


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--jobs", "0"), "at least 1"), (("--jobs", "2", "--tp", "2"), "give one of the two")],
    ids=" ".join,
)
def test_numbers_of_jobs_that_make_no_sense(
    options: tuple[str, ...], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit 2."""
    assert cli.run(["record", "faults:sound", "-o", str(tmp_path / "golden")]) == 0
    assert cli.run(["verify", str(tmp_path / "golden"), *options]) == 2
    assert says in capfd.readouterr().err


def test_torchrun_shares_trials_out(tmp_path: Path) -> None:
    """Under torchrun ``--jobs`` is the number of its processes: each takes trials, rank 0 has the result of one process."""
    golden = tmp_path / "faulty"
    assert cli.run(["record", "faults:linear_by_rows", "-o", str(golden)]) == 0
    options = ["verify", str(golden), "--n-trials", "12"]
    assert cli.run([*options, "--json", str(tmp_path / "one.json")]) == 1
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "detinfer"]
    file = tmp_path / "two.json"
    ended = subprocess.run(
        [*start, *options, "--jobs", "2", "--json", str(file)], capture_output=True, text=True, check=False, timeout=180
    )
    assert "exitcode  : 1" in ended.stderr, ended.stderr  # torchrun's own is 1 for any failure
    assert json.dumps(result(file)) == json.dumps(result(tmp_path / "one.json"))


def test_under_torchrun_jobs_are_its_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another number of jobs is a usage error."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="the launcher started 3 processes"):
        check(2, None)
    check(3, None)
