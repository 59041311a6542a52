"""Proofs on disk: read back as they were written, and not used where they are stale, damaged or somebody else's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from detinfer.errors import UsageError
from detinfer.ops import cublaslt, matmul_store, matmul_table
from detinfer.ops.matmul_store import NotRead, Read, read, write
from detinfer.ops.matmul_table import Choice, Key, Table

HERE = {"name": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0 abc", "kernels": "f" * 64}
ALGORITHM = bytes(range(cublaslt.ALGORITHM_BYTES))


def a_table(n: int = 4096, dtype: torch.dtype = torch.bfloat16) -> Table:
    key = Key(n, 1024, dtype, 1032, True, 0)
    choices = (Choice("skinny", 3), Choice("cublaslt_no_split", -1, ALGORITHM))
    return Table(key, (8, 16384), choices, 1024, (1024, 2048), 123456)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, on a machine whose GPU is described by HERE."""
    monkeypatch.setenv("DETINFER_CACHE", str(tmp_path))
    monkeypatch.setattr(matmul_store, "fingerprint", lambda device: dict(HERE))
    matmul_store.state.cache_clear()
    matmul_table.forget()
    yield tmp_path / "proofs" / matmul_store.FILE
    matmul_store.state.cache_clear()
    matmul_table.forget()


def test_tables_come_back_as_they_were(home: Path) -> None:
    tables = [a_table(), a_table(576, torch.float32)]
    write(home, tables, HERE)
    found = read(home, HERE, 3)
    assert isinstance(found, Read)
    assert set(found.tables) == {Table(t.key._replace(device=3), *list(vars(t).values())[1:]) for t in tables}
    assert list(home.parent.iterdir()) == [home]


def test_a_file_is_taken_into_use_once(home: Path) -> None:
    write(home, [a_table()], HERE)
    assert isinstance(matmul_store.state(0), Read)
    assert matmul_table.table(a_table().key) == a_table()
    newer = Table(a_table().key, (16384,), (Choice("tile", 1),), 1024, (), 1)
    matmul_table.use([newer])
    matmul_store.state.cache_clear()
    matmul_store.state(0)
    assert matmul_table.table(newer.key) == newer, "what this process measured is newer than the file"


def test_another_environment_is_stale_and_says_what_changed(home: Path) -> None:
    write(home, [a_table()], {**HERE, "driver": "570.0"})
    found = matmul_store.state(0)
    assert isinstance(found, NotRead) and found.kind == "stale"
    assert "driver was 570.0, is 580.1" in found.reason and "torch" not in found.reason
    assert not matmul_table.tables()
    path, before = matmul_store.keep([a_table()], 0)
    assert path == home and "another environment" in before
    assert isinstance(matmul_store.state(0), Read)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"n": 4096', '"n": 4095'),
        ('"skinny"', '"fastest"'),
        ("4096", "-4096"),
        ('"schema": 1', '"schema": 2'),
        ("{", "["),
        ('"tables"', '"table"'),
    ],
)
def test_a_changed_file_is_not_used_and_not_replaced(home: Path, old: str, new: str) -> None:
    write(home, [a_table()], HERE)
    text = home.read_text()
    assert old in text
    home.write_text(text.replace(old, new, 1))
    found = matmul_store.state(0)
    assert isinstance(found, NotRead) and found.kind == "corrupt" and str(home) in found.reason
    changed = home.read_bytes()
    with pytest.raises(UsageError, match="give --force"):
        matmul_store.keep([a_table()], 0)
    assert home.read_bytes() == changed
    matmul_store.keep([a_table()], 0, force=True)
    assert isinstance(matmul_store.state(0), Read)


@pytest.mark.parametrize(
    "change",
    [
        {"n": 0},
        {"choices": [["reference", 0, ""], ["skinny", 1, ""]]},
        {"choices": [["cublaslt_no_split", -1, "00"], ["skinny", 1, ""]]},
        {"uppers": [8]},
        {"uppers": [9, 8]},
        {"dtype": "float64"},
        {"added": 1},
        {"sampled": ["x"]},
        {"compared": True},
    ],
)
def test_a_table_that_makes_no_sense_is_not_used(home: Path, change: dict[str, object]) -> None:
    """Even with a digest that fits."""
    write(home, [a_table()], HERE)
    data = json.loads(home.read_text())
    data["tables"][0] |= change
    data["sha256"] = matmul_store._digest(data["tables"])
    home.write_text(json.dumps(data))
    found = read(home, HERE, 0)
    assert isinstance(found, NotRead) and found.kind == "corrupt"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b'{"schema": 1}', b"PK\x03\x04"])
def test_somebody_elses_file_is_not_used(home: Path, content: bytes) -> None:
    home.parent.mkdir()
    home.write_bytes(content)
    found = matmul_store.state(0)
    assert isinstance(found, NotRead) and found.kind == "corrupt"


def test_shapes_are_added_to_those_of_this_environment(home: Path) -> None:
    assert matmul_store.keep([a_table(64), a_table(72)], 0) == (home, "")
    _, before = matmul_store.keep([a_table(80), Table(a_table(72).key, (1,), (Choice("tile", 0),), 0, (), 9)], 0)
    assert before == "2 tables of this environment were there"
    found = read(home, HERE, 0)
    assert isinstance(found, Read)
    assert {t.key.n: t.choices[0].path for t in found.tables} == {64: "skinny", 72: "tile", 80: "skinny"}


def test_no_file_and_a_failed_write_lose_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = matmul_store.state(0)
    assert isinstance(found, NotRead) and found.kind == "missing" and "detinfer prove" in found.reason
    write(home, [a_table()], HERE)
    before = home.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(matmul_store.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(home, [a_table(8)], HERE)
    assert home.read_bytes() == before and list(home.parent.iterdir()) == [home]
