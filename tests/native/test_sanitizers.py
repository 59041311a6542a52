"""The shared-memory protocol under ThreadSanitizer and AddressSanitizer, on random collectives whose results are checked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "tests/native/communicator_stress.cpp",  # includes csrc/cpu/communicator.cpp
    ROOT / "csrc/cpu/collectives.cpp",
    ROOT / "csrc/cpu/all_reduce.cpp",
]
FLAGS = [
    "-std=gnu++17",
    "-g",
    "-pthread",
    "-w",
    "-ffp-contract=off",
    "-DDETINFER_LEVEL=baseline",
    "-DDETINFER_LEVEL_baseline=1",
]


def build(where: Path, *flags: str) -> Path:
    """The stress program built with ``flags``, or a skip that says what this machine lacks."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    probe = where / "probe.cpp"
    probe.write_text("int main() {}\n")
    if subprocess.run([compiler, *flags, probe, "-o", where / "probe"], capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} does not link with {' '.join(flags)}")
    program = where / "stress"
    built = subprocess.run(
        [compiler, *FLAGS, *flags, *SOURCES, "-o", program], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return program


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it without address space randomisation where that can be said: ThreadSanitizer wants its memory in one place."""
    setarch = shutil.which("setarch")
    command = [*([setarch, "-R"] if setarch else []), program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_data_race(tmp_path: Path) -> None:
    """2, 3 and 8 ranks as threads: every result is right, and no two accesses are unordered."""
    program = build(tmp_path, "-O1", "-fsanitize=thread")
    for ranks, seed, calls in ((2, 1, 600), (3, 2, 600), (8, 3, 150)):
        done = run(program, "threads", ranks, seed, calls)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr[:4000]
        assert f"{calls} calls are right" in done.stdout


def test_a_data_race_is_seen(tmp_path: Path) -> None:
    """The control: with relaxed atomics the same program is reported."""
    program = build(tmp_path, "-O1", "-fsanitize=thread", "-DDETINFER_WEAKENED")
    done = run(program, "threads", 3, 1, 50)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr


def test_no_bad_access(tmp_path: Path) -> None:
    """Ranks as threads and as processes: nothing is touched outside its bounds, and nothing is undefined."""
    program = build(tmp_path, "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    for how, ranks, seed, calls in (("threads", 3, 1, 400), ("processes", 2, 2, 400), ("processes", 7, 3, 150)):
        done = run(program, how, ranks, seed, calls)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr[:4000]
        assert f"{calls} calls are right" in done.stdout
