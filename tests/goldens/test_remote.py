"""Goldens in remote folders, which fsspec reaches: here its folder in memory stands for S3 and the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from detinfer import cli

URL = "memory://bucket/goldens/dense"


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A golden of several files, pushed to ``URL``; the cache is this test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    path = tmp_path / "dense"
    command = ["record", "builtin:dense", "-o", str(path), "--n-prompts", "2", "--decode-steps", "4", "--shard-mb", "1"]
    assert cli.run(command) == 0
    assert cli.run(["golden", "push", str(path), URL]) == 0
    yield path
    files.store.clear()


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_fetched_is_what_was_pushed(golden: Path, tmp_path: Path) -> None:
    """Byte by byte; a golden that is there is not replaced unless told."""
    assert cli.run(["golden", "fetch", URL, str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(golden)
    assert cli.run(["golden", "fetch", URL, str(tmp_path / "back")]) == 2
    assert cli.run(["golden", "fetch", URL, str(tmp_path / "back"), "--force"]) == 0


def test_verify_takes_a_url(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched once; fetched again when another golden is there."""
    command = ["verify", URL, "--n-trials", "2", "--axes", "batch"]
    assert cli.run(command) == 0
    kept = list((tmp_path / "cache").rglob("manifest.json"))
    assert len(kept) == 1
    assert contents(kept[0].parent) == contents(golden)
    opened: list[str] = []
    real = fsspec.implementations.memory.MemoryFileSystem.open
    monkeypatch.setattr(
        fsspec.implementations.memory.MemoryFileSystem,
        "open",
        lambda self, path, *a, **k: opened.append(path) or real(self, path, *a, **k),
    )
    assert cli.run(command) == 0
    assert not any(path.endswith(".safetensors") for path in opened)
    assert cli.run(["golden", "check", URL]) == 0
    assert cli.run(["golden", "show", URL]) == 0


@pytest.mark.parametrize("how", ["flipped", "short", "missing", "manifest", "name"])
def test_what_comes_is_checked(how: str, golden: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file that is not what the manifest says is named, exit 4, and nothing is left."""
    files = fsspec.filesystem("memory")
    name = "tensors.safetensors" if how in ("flipped", "short", "missing") else "manifest.json"
    file = f"/bucket/goldens/dense/{name}"
    data = files.cat_file(file)
    if how == "missing":
        files.rm_file(file)
    elif how == "flipped":
        files.pipe_file(file, data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "short":
        files.pipe_file(file, data[:-1])
    elif how == "manifest":
        files.pipe_file(file, data.replace(b'"step": 0', b'"step": 1', 1))
    else:
        from detinfer.goldens.manifest import digest

        held = json.loads(data)
        held["files"][0]["name"] = "../outside.safetensors"
        files.pipe_file(file, json.dumps({**held, "digest": digest(held)}).encode())
    assert cli.run(["golden", "fetch", URL, str(tmp_path / "back")]) == 4
    error = capfd.readouterr().err
    assert ("outside" if how == "name" else name) in error
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["dense"]


def test_pushing_never_goes_over_another_golden(
    golden: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same again is nothing; another is refused unless told; a damaged one is not pushed."""
    assert cli.run(["golden", "push", str(golden), URL]) == 0
    other = tmp_path / "other"
    assert cli.run(["record", "builtin:dense", "-o", str(other), "--n-prompts", "1"]) == 0
    before = fsspec.filesystem("memory").cat_file("/bucket/goldens/dense/manifest.json")
    assert cli.run(["golden", "push", str(other), URL]) == 2
    assert fsspec.filesystem("memory").cat_file("/bucket/goldens/dense/manifest.json") == before
    assert cli.run(["golden", "push", str(other), URL, "--force"]) == 0
    assert cli.run(["golden", "fetch", URL, str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(other)
    (other / "tensors.safetensors").write_bytes(b"")
    assert cli.run(["golden", "push", str(other), "memory://bucket/new"]) == 4
    assert not fsspec.filesystem("memory").exists("/bucket/new/manifest.json")


def test_places_that_cannot_be_reached(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No golden there: 4. No such protocol: 2."""
    assert cli.run(["golden", "fetch", "memory://bucket/none", str(tmp_path / "a")]) == 4
    assert "there is no manifest.json" in capfd.readouterr().err
    assert cli.run(["golden", "fetch", "nothing://bucket/none", str(tmp_path / "a")]) == 2
    assert cli.run(["golden", "fetch", f"file://{tmp_path}/none", str(tmp_path / "a")]) == 4
