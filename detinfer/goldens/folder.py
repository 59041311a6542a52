"""Put a folder in place in one step: written beside, then renamed. Nothing half-written has the final name."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detinfer.errors import InfrastructureError, UsageError


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into InfrastructureError."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise InfrastructureError(f"{place}: {error.strerror or error}: nothing was written at {path}") from error


def destination(path: Path, overwrite: bool, marker: str, own: re.Pattern[str]) -> Path:
    """The absolute path of a folder that may be written; UsageError when something there must not be replaced.

    A folder may be replaced only with ``overwrite``, and only when it holds the file ``marker`` of ours and nothing
    but files whose names match ``own``. An empty folder may always be.
    """
    path = Path(os.path.realpath(path))
    with disk(path):
        _restore(path)
        if not path.exists():
            return path
        if not path.is_dir():
            raise UsageError(f"{path}: exists and is no folder; choose another path")
        names = sorted(item.name for item in path.iterdir())
        if not names:
            return path
        if marker not in names or '"detinfer"' not in (path / marker).read_text(encoding="utf-8", errors="replace"):
            raise UsageError(f"{path}: a folder that is not a golden is never overwritten; choose another path")
        foreign = [name for name in names if not own.fullmatch(name)]
        if foreign:
            raise UsageError(f"{path}: holds {foreign[0]}, which is no part of a golden: move it away first")
        if not overwrite:
            raise UsageError(
                f"{path}: a golden is there already; choose another path, or replace it with --force (overwrite=True)"
            )
    return path


def make_partial(path: Path) -> Path:
    """A fresh folder beside ``path`` to write in; those that earlier processes left behind are removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in _siblings(path, "partial"):
        if not _alive(leftover):
            remove(leftover)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    number = 0
    while partial.exists():  # another writer of this process
        number += 1
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{number}")
    partial.mkdir()
    return partial


def write_file(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def put_in_place(partial: Path, path: Path) -> None:
    """Rename ``partial`` to ``path``. What was there stands beside it under another name until then, no longer."""
    _sync(partial)
    old: Path | None = None
    if path.exists() and any(path.iterdir()):
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    _sync(path.parent)
    if old is not None:
        remove(old)


def remove(path: Path) -> None:
    """Remove a folder of ours; one that cannot be removed is in nobody's way."""
    shutil.rmtree(path, ignore_errors=True)


def hint(path: Path) -> str:
    """What to do about a folder that a killed overwrite left under another name; else nothing."""
    old = _siblings(Path(os.path.realpath(path)), "old")
    return f"; an overwrite was killed half-way: the golden before it is {old[0]}, rename it back" if old else ""


def _restore(path: Path) -> None:
    # A kill between the two renames of put_in_place: the one before is whole, and the new one never had the name.
    for old in _siblings(path, "old"):
        if _alive(old):
            continue
        if path.exists():
            remove(old)
        else:
            old.rename(path)


def _siblings(path: Path, kind: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(path.name)}\.{kind}-\d+(-\d+)?")
    if not path.parent.is_dir():
        return []
    return sorted(item for item in path.parent.iterdir() if name.fullmatch(item.name))


def _alive(sibling: Path) -> bool:
    """Whether the process that named a folder still runs."""
    process = int(re.findall(r"(?:partial|old)-(\d+)", sibling.name)[-1])
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(folder: Path) -> None:
    if os.name != "posix":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
