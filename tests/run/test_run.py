"""``detinfer run``: the policy in every Python child, an account of it, and the exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli, native
from detinfer.policy import Policy
from detinfer.policy.engines import wanted
from detinfer.policy.switches import read_switches

ROOT = Path(__file__).parents[2]
FAMILY = Path(__file__).parent / "family.py"


@dataclass
class Done:
    """A finished run: our exit code, and what the command and we have printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """``detinfer run`` of a command in the test's folder: how it ended, and its report."""

    def run(*command: str, options: tuple[str, ...] = (), **variables: str) -> tuple[Done, dict[str, Any]]:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        paths = os.pathsep.join(filter(None, (variables.pop("FIRST", ""), str(ROOT))))
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            for name, value in {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}.items():
                patch.setenv(name, value)
            code = cli.run(["run", "--report", str(report), *options, "--", *command])
        return Done(code, *capfd.readouterr()), json.loads(report.read_text()) if report.exists() else {}

    return run


def python(code: str) -> tuple[str, str, str]:
    return sys.executable, "-c", code


def test_workers_and_grandchildren_are_each_refused(start: Any, tmp_path: Path) -> None:
    """torchrun's two workers, a program that each starts, and a process that each forks: six refusals, all told.

    The programs go on and end with 0: the run does not.
    """
    native.library()
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done, report = start(*launcher, str(FAMILY), str(tmp_path))
    refused = {path.name: path.read_text() for path in tmp_path.glob("*-*")}
    kinds = sorted(name.partition("-")[0] for name in refused)
    assert kinds == ["forked", "forked", "grandchild", "grandchild", "worker", "worker"], done.stderr
    for text in refused.values():
        assert (
            text.startswith("RefusedError: c10d::allreduce_ (product) on float32 is refused")
            and "all_gather its" in text
        )
    assert {one["pid"] for one in report["refused"]} == {int(name.partition("-")[2]) for name in refused}
    assert (report["command_exit_code"], report["exit_code"], done.returncode) == (0, 2, 2)
    assert report["refusals"] == 6
    sums = {row["op"]: row for row in report["decisions"] if row["op"].startswith("c10d") and row["accepted"]}
    assert sums["c10d::allreduce_(sum, 2 ranks)"]["count"] == 2
    assert sums["c10d::allreduce_(sum, 1 ranks)"]["count"] == 4
    assert sums["c10d::allreduce_(sum, 2 ranks)"]["path"] == "csrc/all_reduce"
    assert all(process["ended"] for process in report["processes"])
    assert {process["pid"] for process in report["processes"]} >= {one["pid"] for one in report["refused"]}
    assert "exit code 2: 6 calls refused (the command's own exit code was 0)" in done.stderr
    assert "Exception ignored" not in done.stderr


CANONICAL = """
import torch, sys
from detinfer.bits import digest
g = torch.arange(3000, dtype=torch.float32).sin().clone()
print(digest((torch.softmax(g, -1))))
print(g[:3])
sys.exit(7)
"""


def test_the_exit_code_and_the_bits(start: Any, tmp_path: Path) -> None:
    """The command's own code; operations run on their proved paths; printing a tensor is nobody's operation."""
    done, report = start(*python(CANONICAL))
    assert (done.returncode, report["command_exit_code"]) == (7, 7), done.stderr
    assert "tensor([" in done.stdout
    (row,) = [
        row for row in report["decisions"] if row["op"].startswith("aten::_softmax") or row["op"] == "aten::softmax.int"
    ]
    assert row["path"] == "csrc/rows" and row["count"] == 1


def test_a_library_that_looks_for_torch_first(start: Any, tmp_path: Path) -> None:
    """Looking for torch, as transformers does before it imports it, does not take the policy away."""
    done, report = start(*python(f"import importlib.util\nimportlib.util.find_spec('torch')\n{CANONICAL}"))
    assert (done.returncode, len(report["processes"])) == (7, 1), done.stderr
    assert any(row["path"] == "csrc/rows" for row in report["decisions"])


def test_an_operation_that_nobody_covers(start: Any, tmp_path: Path) -> None:
    """Refused with a message; allowed by name; trusted."""
    code = "import torch\nprint(torch.cumsum(torch.ones(3), 0).shape)"
    done, report = start(*python(code))
    assert (done.returncode, report["command_exit_code"]) == (2, 1)
    assert "aten::cumsum on float32 is refused: it is a running sum" in done.stderr
    done, report = start(*python(code), options=("--allow", "aten::cumsum"))
    assert done.returncode == 0 and [row["op"] for row in report["decisions"] if row["allowed"]] == ["aten::cumsum"]
    assert "allowed  aten::cumsum float32: 1 calls" in done.stderr
    done, report = start(*python(code), options=("--uncovered", "trust"))
    assert done.returncode == 0 and report["policy"]["uncovered"] == "trust"


def test_nothing_under_the_policy_is_said(start: Any, tmp_path: Path) -> None:
    """A command without torch ends with 5; one that fails keeps its code; one that cannot be started is an error."""
    done, report = start("true")
    assert (done.returncode, report["processes"]) == (5, []) and "nothing was under the policy" in done.stderr
    assert start("false")[0].returncode == 1
    assert start("sh", "-c", "kill -9 $$")[0].returncode == 128 + signal.SIGKILL
    done, _ = start("no-such-program")
    assert done.returncode == 2 and "it cannot be started" in done.stderr


def test_an_environment_that_contradicts_the_policy(start: Any, tmp_path: Path) -> None:
    """Said before anything starts."""
    done, _ = start(*python("open('started', 'w')"), NCCL_ALGO="ring")
    assert done.returncode == 2 and "NCCL_ALGO=ring" in done.stderr
    assert not (tmp_path / "started").exists()


def test_other_hooks_and_detinfer_first(start: Any, tmp_path: Path) -> None:
    """A sitecustomize of the environment's own runs too; a program may import detinfer before torch, and nest policies."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/sitecustomize.py").write_text("import os\nos.environ['OWN_HOOK'] = 'ran'\n")
    code = """
import os, sys
from detinfer import deterministic
import torch
print(os.environ['OWN_HOOK'], sys.modules['sitecustomize'].__file__)
with deterministic('batch', uncovered='trust'):
    torch.softmax(torch.ones(3), -1)
"""
    done, report = start(*python(code), FIRST=str(tmp_path / "own"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ran", str(tmp_path / "own/sitecustomize.py")]
    assert len(report["processes"]) == 1


def test_a_process_that_cannot_have_the_policy_does_not_run(start: Any, tmp_path: Path) -> None:
    """Where detinfer is missing, and where a child's environment contradicts the policy."""
    done, _ = start(*python("import sys; sys.modules['detinfer'] = None\nimport torch; print('went on')"))
    assert done.returncode == 1 and "cannot import detinfer" in done.stderr and "went on" not in done.stdout
    code = "import torch; print('went on')"
    done, _ = start("env", "NCCL_ALGO=ring", *python(code))
    assert done.returncode == 2 and "cannot be put in force" in done.stderr and "went on" not in done.stdout


def test_a_killed_process_leaves_what_it_did(start: Any, tmp_path: Path) -> None:
    """Its refusals and decisions are on disk before it is killed; its counts are said to be lower bounds."""
    code = """
import os, signal, torch
try:
    torch.cumsum(torch.ones(3), 0)
except Exception:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done, report = start(*python(code))
    assert done.returncode == 2 and report["command_exit_code"] == 128 + signal.SIGKILL
    assert report["refusals"] == 1 and not report["processes"][0]["ended"]
    assert "lower bounds" in done.stderr


@pytest.mark.parametrize("engine", ["sglang", "vllm", "transformers"])
def test_engines_switches(start: Any, tmp_path: Path, engine: str) -> None:
    """``--engine`` sets them for the command, and ``detinfer env --engine`` prints the same."""
    expected = wanted(engine, Policy())
    assert [read.contradiction for read in read_switches(Policy(), expected) if read.contradiction] == []
    done, _ = start("env", options=("--engine", engine))
    assert set(expected.items()) <= {tuple(line.split("=", 1)) for line in done.stdout.splitlines() if "=" in line}
    assert cli.run(["env", "--engine", engine]) == 0
