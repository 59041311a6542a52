"""The scripts that make the environment and run the checks, with pip and detinfer replaced."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fresh copy of a script as a module, known by its name for the length of a test."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


class Machine:
    """An active environment in a folder, with a torch of some version, whose pip only notes what it was given."""

    def __init__(self, folder: Path, torch: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.installed: list[str] = []
        self.environment = script("environment", monkeypatch)
        answers = {"prefix": str(folder), "torch": torch}
        monkeypatch.setattr(self.environment, "_active", lambda: True)
        monkeypatch.setattr(self.environment, "_ask", lambda _, code: answers["torch" if "torch" in code else "prefix"])
        monkeypatch.setattr(self.environment, "_pip", lambda _, *words: self.installed.append(" ".join(words)))

    def prepare(self, *extras: str, smollm2: bool = False) -> list[str]:
        """What pip is asked to install."""
        self.installed.clear()
        assert self.environment.prepare(extras, smollm2) == Path(sys.executable)
        return list(self.installed)


def test_torch_comes_first_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip would choose another torch by itself, so ours is installed before the project; SmolLM2 without its needs."""
    machine = Machine(tmp_path, "", monkeypatch)
    torch, project, smollm2 = machine.prepare("hf", smollm2=True)
    assert torch == machine.environment.TORCH
    assert project.startswith("--editable ")
    assert project.endswith("[hf]")
    assert smollm2 == f"--no-deps {machine.environment.SMOLLM2}"


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.15.0", "3.0"])
def test_torch_is_kept(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that is new enough stays."""
    assert [words for words in Machine(tmp_path, version, monkeypatch).prepare() if words.startswith("torch")] == []


def test_old_torch_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that is too old is named, and nothing is installed over it."""
    machine = Machine(tmp_path, "2.9.1+cpu", monkeypatch)
    with pytest.raises(SystemExit, match=r"torch 2\.9\.1\+cpu; detinfer needs 2\.11 or newer"):
        machine.prepare()
    assert machine.installed == []


def test_fresh_environment_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed again until something is wanted that is not there, or a source of the build changes."""
    machine = Machine(tmp_path, "2.13.0", monkeypatch)
    assert len(machine.prepare("dev")) == 1
    assert machine.prepare("dev") == []
    (project,) = machine.prepare("hf")
    assert project.endswith("[dev,hf]")
    assert machine.prepare("dev") == []
    monkeypatch.setattr(machine.environment, "_digest", lambda: "of other sources")
    assert len(machine.prepare("dev")) == 1


def test_a_broken_stamp_is_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file cut short by a full disk means that nothing is known."""
    machine = Machine(tmp_path, "2.13.0", monkeypatch)
    machine.prepare("dev")
    (tmp_path / machine.environment.STAMP).write_text('{"digest": "')
    assert len(machine.prepare("dev")) == 1


def test_counts_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of the checks counts the tests of every session; an error is a failure."""
    suite = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}"/></testsuites>'
    (tmp_path / "tests.xml").write_text(suite.format(10, 1, 2, 3))
    (tmp_path / "docs.xml").write_text(suite.format(5, 0, 0, 0))
    script("environment", monkeypatch)
    assert script("check", monkeypatch).counts(tmp_path) == (9, 3, 3)


@pytest.mark.parametrize(("front", "beside"), [("0", "0"), ("3", "0"), ("0", "4")])
def test_a_session_beside_the_others(
    front: str, beside: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both run at one time, what one of them says comes last, and the failure of either is the checks'."""
    code = (
        "import pathlib, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "name, other, status = sys.argv[1:]\n"
        "(here / name).touch()\n"
        "while not (here / other).exists(): time.sleep(0.01)\n"
        "print(name, flush=True)\n"
        "sys.exit(int(status))"
    )
    script("environment", monkeypatch)
    lanes = script("check", monkeypatch).lanes
    status = lanes(
        [sys.executable, "-c", code], dict(os.environ), ["front", "beside", front], ["beside", "front", beside]
    )
    assert status == int(front) + int(beside)
    assert capfd.readouterr().out.split() == ["front", "beside"]
    assert lanes([sys.executable, "-c", "raise SystemExit(5)"], dict(os.environ), ["alone"], []) == 5


@pytest.mark.parametrize(("second", "same"), [(b"bytes", True), (b"bites", False)])
def test_recording_twice_compares_bytes(
    second: bytes, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recordings that differ in one byte are seen, and the file is named; one that was not made is a failure."""
    goldens = script("goldens", monkeypatch)
    (words,) = goldens.record({"goldens/a": {"command": "detinfer record target --seed 3"}}, tmp_path, "1")
    assert words == ["record", "target", "--seed", "3", "--output", str(tmp_path / "1" / "goldens_a")]
    outputs = [tmp_path / "1", tmp_path / "2"]
    for output, content in zip(outputs, (b"bytes", second), strict=True):
        output.mkdir()
        (output / "tensors.safetensors").write_bytes(content)
    passed, _, text = goldens.alike([(True, 0.5, ""), (True, 0.5, "")], outputs)
    assert passed is same
    assert ("tensors.safetensors" in text) is not same
    assert goldens.alike([(True, 0.5, ""), (False, 0.5, "why")], outputs) == (False, 1.0, "why")


def test_commands_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own exit code and output; those that a process did not come to have failed."""
    goldens = script("goldens", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    commands = [["--help"], ["verify", "nothing-here"], ["--help"]]
    found = goldens.detinfer({}, commands)
    assert [passed for passed, _, _ in found] == [True, False, True]
    assert found[0][2].startswith("$ detinfer --help") and "nothing-here" not in found[0][2]
    assert "nothing-here" in found[1][2].partition("\n")[2] and found[1][2].endswith("exit code 4")
    monkeypatch.setattr(goldens.sys, "executable", shutil.which("false"))
    assert [passed for passed, _, _ in goldens.detinfer({}, commands)] == [False] * 3
