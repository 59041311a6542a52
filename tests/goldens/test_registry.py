"""``detinfer golden``: listing, showing, checking and tidying goldens without loading a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from detinfer import cli, environment
from detinfer.goldens import registry

COMMITTED = Path(__file__).parents[2] / "goldens"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A golden, vectors, one that nobody can read, and what a killed writer left."""
    assert cli.run(["record", "builtin:dense", "-o", str(tmp_path / "a" / "dense"), "--n-prompts", "1"]) == 0
    shutil.copytree(COMMITTED / "rms_norm", tmp_path / "rms_norm")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text("{}")
    (tmp_path / ".dense.partial-17").mkdir()
    (tmp_path / ".dense.partial-17" / "manifest.json").write_text("{}")
    return tmp_path


def test_ls(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every golden below the folder, also one that cannot be read, and no leftover."""
    capfd.readouterr()
    assert cli.run(["golden", "ls", str(folder), "--json"]) == 0
    found = {Path(entry["path"]).name: entry for entry in json.loads(capfd.readouterr().out)}
    assert set(found) == {"dense", "rms_norm", "odd"}
    assert (found["dense"]["of"], found["dense"]["here"], len(found["dense"]["environment"])) == (
        "builtin:dense",
        True,
        12,
    )
    assert found["rms_norm"]["of"] == "vectors:rms_norm"
    assert "unreadable" in found["odd"]["problem"]
    assert cli.run(["golden", "ls", str(folder)]) == 0
    assert "vectors:rms_norm" in capfd.readouterr().out
    assert cli.run(["golden", "ls", str(folder / "none")]) == 2


def test_another_environment_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of fields that differ, and another key."""
    before = next(entry for entry in registry.entries(folder) if entry.of == "builtin:dense")
    real = environment.capture
    monkeypatch.setattr(
        environment,
        "capture",
        lambda *a, **k: environment.Environment(**{**vars(real(*a, **k)), "torch": "1.0", "libc": "other"}),
    )
    after = next(entry for entry in registry.entries(folder) if entry.of == "builtin:dense")
    assert (before.here, after.here, after.problem) == (True, False, "2 fields differ")
    assert after.environment == before.environment, "the key is the recording's"


def test_show(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Target, units and environment, a line each."""
    capfd.readouterr()
    assert cli.run(["golden", "show", str(folder / "a" / "dense")]) == 0
    out = capfd.readouterr().out
    for words in ("builtin:dense (Decoder, float32)", "leaf", "the recorded environment", "none was given"):
        assert words in out
    assert cli.run(["golden", "show", str(folder / "rms_norm")]) == 0
    assert cli.run(["golden", "show", str(folder / "odd")]) == 4


def test_check_reads_every_tensor(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit 0 for whole ones; a flipped bit of a tensor file is found, and exits with 4."""
    golden = folder / "a" / "dense"
    assert cli.run(["golden", "check", str(golden), str(folder / "rms_norm")]) == 0
    file = next(golden.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    capfd.readouterr()
    assert cli.run(["golden", "check", str(golden), str(folder / "rms_norm")]) == 4
    out = capfd.readouterr().out
    assert "SHA-256" in out
    assert f"{folder / 'rms_norm'}: whole" in out


def test_prune_removes_leftovers_alone(folder: Path) -> None:
    """Listed first, removed when asked; goldens stay."""
    left = folder / ".dense.partial-17"
    assert cli.run(["golden", "prune", str(folder)]) == 0
    assert left.exists()
    assert cli.run(["golden", "prune", str(folder), "--delete"]) == 0
    assert not left.exists()
    assert (folder / "odd").exists()
    assert len(registry.entries(folder)) == 3
