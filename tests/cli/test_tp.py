"""``--tp``: one command starts the ranks; what they find and how they end reaches the user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli

ROOT = Path(__file__).parents[2]
SMALL = ("--n-prompts", "2", "--length", "3", "--decode-steps", "1")


def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """detinfer as a command, alone or under a launcher."""
    command = [sys.executable, *launcher, "-m", "detinfer", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """builtin:moe on 3 ranks."""
    folder = tmp_path_factory.mktemp("tp") / "golden"
    assert cli.run(["record", "builtin:moe", "--tp", "3", "-o", str(folder), *SMALL]) == 0
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def children(process: int) -> Iterator[int]:
    """Processes that ``process`` has started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # gone since
                continue
            if int(words[1]) == process and words[0] != "Z":
                yield int(entry.name)


def state(process: int) -> str:
    """The letter that the kernel has for what a process does."""
    return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0]


def ranks_of(process: int, wanted: int) -> list[int]:
    """The ranks that a command has started, once they all run."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        found = [rank for server in children(process) for rank in children(server)]
        if len(found) == wanted:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{wanted} ranks of {process} did not appear")


@dataclass
class Hung:
    """A command of three ranks of which one was stopped."""

    process: subprocess.Popen[bytes]
    ranks: list[int]


@pytest.fixture(scope="module")
def hung(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hung]:
    """Started early and looked at last: torch's launcher gives a rank that does not end 30 s."""
    command = [sys.executable, "-m", "detinfer", "verify", str(golden), "--n-trials", "300", "--rank-timeout", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path_factory.mktemp("hung"), env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        found = sorted(ranks_of(process.pid, 3))
        time.sleep(2)
        os.kill(found[1], signal.SIGSTOP)
        yield Hung(process, found)
        process.kill()


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="ranks are found through /proc, which is not here"
)


@needs_proc
def test_a_rank_hangs(hung: Hung) -> None:
    """It is stopped, its command waits for it, and the tests below run meanwhile."""
    deadline = time.monotonic() + 240
    while state(hung.ranks[1]) != "T" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state(hung.ranks[1]) == "T"
    assert hung.process.poll() is None


def test_a_golden_names_its_ranks_and_holds_every_ranks_units(golden: Path) -> None:
    held = manifest(golden)
    assert held["ranks"] == 3
    assert held["policy"]["scope"] == "batch"
    names = [{unit["name"] for unit in held["units"] if unit["rank"] == rank} for rank in range(3)]
    assert names[0] == names[1] == names[2]
    assert {"layers.0.self_attn.all_reduce", "layers.1.feed_forward.experts", "layers.1.self_attn.attention"} <= names[
        0
    ]
    outputs = {
        rank: [call["outputs"] for call in unit["calls"]]
        for rank in range(3)
        for unit in held["units"]
        if unit["rank"] == rank and unit["name"] == "layers.1.feed_forward.all_reduce"
    }
    assert outputs[0] == outputs[1] == outputs[2], "the ranks hold the same sums"
    decision = next(one for one in held["decisions"] if one["op"] == "detinfer::all_reduce")
    assert decision["accepted"] and decision["proof"]["cases"] > 1000
    assert all(one["portable"] for one in held["decisions"])


def test_recording_again_gives_the_same_bytes(golden: Path, tmp_path: Path) -> None:
    """Every file of the folder, but for the command's own words in the manifest; rank 0 alone prints."""
    again = tmp_path / "golden"
    done = run("record", "builtin:moe", "--tp", "3", *SMALL, "-o", str(again))
    assert (done.returncode, done.stdout.count("recorded")) == (0, 1), done.stderr
    assert (again / "tensors.safetensors").read_bytes() == (golden / "tensors.safetensors").read_bytes()
    first, second = manifest(golden), manifest(again)
    for held in (first, second):
        del held["command"], held["digest"]
    assert first == second


def test_torchrun_gives_the_same_verdict(golden: Path, tmp_path: Path) -> None:
    """The same command line under torch's launcher; rank 0 alone prints."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    report = tmp_path / "result.json"
    words = ("verify", str(golden), "--tp", "3", "--n-trials", "2", "--json", str(report))
    done = run(*words, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("invariance") == 1
    result = json.loads(report.read_text())
    assert [result[part]["verdict"] for part in ("invariance", "golden", "consistency")] == ["same"] * 3
    paths = next(axis for axis in result["invariance"]["axes"] if axis["name"] == "collectives")
    assert (paths["verdict"], paths["rows_differing"]) == ("same", 0) and paths["comparisons"] == 2 * 2 * 3
    fused = [one for one in result["decisions"] if one["op"] == "detinfer::all_reduce_rms_norm"]
    assert len(fused) == 1 and fused[0]["accepted"], "sums were made in one call with the norm too"
    probe = next(probe for probe in result["invariance"]["sensitivity"] if probe["operation"] == "detinfer::all_reduce")
    assert probe["seen"] and probe["invariant"]


def test_a_launcher_of_another_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torchrun started 3 ranks and --tp says 2; ranks on two hosts, which share no memory."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.run(["record", "builtin:moe", "--tp", "2", "-o", str(tmp_path / "golden")]) == 2
    assert "--tp 2: the launcher started 3 ranks" in capfd.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cli.run(["record", "builtin:moe", "-o", str(tmp_path / "golden")]) == 2
    assert "several hosts" in capfd.readouterr().err


def test_an_error_of_every_rank_is_said_once(golden: Path) -> None:
    """Exit 2, and nothing of the launcher's own."""
    done = run("record", "builtin:moe", "--tp", "3", "-o", str(golden), *SMALL)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert done.stderr.count("error") == 1


def test_a_verdict_reaches_the_user(golden: Path) -> None:
    """Exit 5 of a vacuous sweep, 4 of another model."""
    assert cli.run(["verify", str(golden), "--batch-sizes", "1", "--n-trials", "1"]) == 5
    assert cli.run(["verify", str(golden), "--target", "builtin:dense"]) == 4
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the launcher's handlers are taken out again"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("record", "builtin:moe", "--tp", "9"), "target builtin:moe: 9 ranks; 1 to 8"),
        (("record", "hf:somewhere", "--tp", "9"), "target hf:somewhere: 9 ranks; 1 to 8"),
        (("record", "builtin:moe", "--tp", "0"), "--tp 0: at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_spread(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit 2 at once, with the reason; nothing is started or written."""
    assert cli.run([*arguments, "-o", str(tmp_path / "golden")]) == 2
    assert says in capfd.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("tp", ["1", "2"])
def test_on_another_number_of_ranks_bits_are_not_promised(tp: str, golden: Path, tmp_path: Path) -> None:
    """Exit 0: the file's bits differ, which is reported; rows and ranks agree among themselves."""
    report = tmp_path / "result.json"
    assert (
        cli.run(["verify", str(golden), "--tp", tp, "--n-trials", "1", "--axes", "batch", "--json", str(report)]) == 0
    )
    result = json.loads(report.read_text())
    found = result["golden"]
    assert found["verdict"] == "not_promised"
    assert 0 < found["rows_differing"] < found["rows_compared"]
    assert f"recorded on 3 ranks, verified on {tp} rank" in found["reasons"][0]
    axis = next(one for one in result["invariance"]["axes"] if one["name"] == "tp")
    assert (axis["verdict"], axis["rows_differing"]) == ("not_promised", found["rows_differing"])
    assert found["first"]["axis"] == f"tp: 3 -> {tp}"
    assert (found["cause"]["path"], found["cause"]["operation"]) == (found["first"]["unit"], "detinfer::all_reduce")
    assert f"--tp {tp}" in found["first"]["command"]
    assert result["invariance"]["verdict"] == "same"


@needs_proc
@pytest.mark.parametrize("victim", ["rank", "launcher"])
def test_a_death_ends_everything(victim: str, golden: Path, tmp_path: Path) -> None:
    """kill -9 of a rank: exit 6, and its number is named. Of the launcher: the ranks end by themselves."""
    command = [sys.executable, "-m", "detinfer", "verify", str(golden), "--n-trials", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        found = ranks_of(process.pid, 3)
        time.sleep(1)
        os.kill(sorted(found)[-1] if victim == "rank" else process.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=240)
    if victim == "rank":
        assert process.returncode == 6
        # The launcher sees the death, or a rank that was waiting for the dead one ends first and says whom it missed.
        text = said.decode()
        assert "rank 2 of 3 was killed by SIGKILL" in text or "rank 2 died" in text, text
    deadline = time.monotonic() + 240
    while (left := [rank for rank in found if Path(f"/proc/{rank}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@needs_proc
def test_a_rank_that_hangs_ends_everything(hung: Hung) -> None:
    """A rank is stopped: after ``--rank-timeout`` the others name it, exit 6, and it is ended as well."""
    _, said = hung.process.communicate(timeout=240)
    assert hung.process.returncode == 6
    assert "rank 1 did not arrive within 2 s" in said.decode()
    assert not [rank for rank in hung.ranks if Path(f"/proc/{rank}").exists()]
