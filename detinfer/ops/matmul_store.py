"""Tables of ``matmul_table`` on disk, with the environment that they were proved in: one file for all shapes of a machine.

A file is used only whole: by its own digest, and in the environment that it names. Where it is not, products run the path
that is right by construction, and ``state`` has the reason.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detinfer import environment, native
from detinfer.bits import dtype_name
from detinfer.errors import UsageError
from detinfer.ops import cublaslt, matmul_table
from detinfer.ops.matmul_table import Choice, Key, Table

FILE = "matmul_cuda.json"
SCHEMA = 1

_DTYPES = {dtype_name(dtype): dtype for dtype in native.DTYPES}
_PATHS = ("skinny", "tile", "wide", "stream", "cublaslt_no_split")


@dataclass(frozen=True)
class Read:
    """The tables of a file, for one device."""

    tables: tuple[Table, ...]


@dataclass(frozen=True)
class NotRead:
    """Why a file's tables are not used; ``kind`` is ``missing``, ``stale`` (of another environment) or ``corrupt``."""

    kind: str
    reason: str


def folder() -> Path | None:
    """``proofs`` in ``$DETINFER_CACHE``, else in ``detinfer`` of the user's cache; None where there is no home."""
    try:
        cache = os.environ.get("DETINFER_CACHE") or Path(
            os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        ).joinpath("detinfer")
    except RuntimeError:
        return None
    return Path(cache) / "proofs"


def fingerprint(device: int) -> dict[str, str]:
    """What the tables of a device depend on: the GPU, its driver and libraries, torch, and this library of kernels."""
    state = native.load_gpu()
    kernels = hashlib.sha256(state.path.read_bytes()).hexdigest() if isinstance(state, native.Loaded) else "none"
    return environment.gpu(f"cuda:{device}") | {
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "cublaslt": str(cublaslt.version()),
        "kernels": kernels,
    }


def write(path: Path, tables: Iterable[Table], here: dict[str, str]) -> None:
    """Write a file, whole or not at all. Raises OSError where it cannot be written."""
    body = [_to_json(table) for table in sorted(tables, key=lambda table: str(table.key))]
    text = json.dumps({"schema": SCHEMA, "sha256": _digest(body), "environment": here, "tables": body}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read(path: Path, here: dict[str, str], device: int) -> Read | NotRead:
    """The tables of a file for ``device``, whose environment is ``here``, or why they are not used. Never raises."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return NotRead("missing", f"there is no {path}: run detinfer prove")
    except (OSError, UnicodeDecodeError) as error:
        return NotRead("corrupt", f"{path} cannot be read: {error}")
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            return NotRead("corrupt", f"{path} is no file of proofs of this version (schema {SCHEMA})")
        if _digest(data["tables"]) != data["sha256"]:
            return NotRead("corrupt", f"{path} was changed since it was written: its digest is another")
        there = data["environment"]
        if changed := [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]:
            found = ", ".join(f"{name} was {_short(there.get(name))}, is {_short(here.get(name))}" for name in changed)
            return NotRead("stale", f"{path} was proved in another environment: {found}")
        return Read(tuple(_from_json(table, device) for table in data["tables"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return NotRead("corrupt", f"{path} is no file of proofs: {type(error).__name__}: {error}")


def _short(value: str | None) -> str:
    return "unset" if value is None else value[:40]


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _to_json(table: Table) -> dict[str, Any]:
    key = table.key
    return {
        "n": key.n,
        "k": key.k,
        "dtype": dtype_name(key.dtype),
        "w_stride": key.w_stride,
        "added": key.added,
        "uppers": list(table.uppers),
        "choices": [[choice.path, choice.variant, choice.algorithm.hex()] for choice in table.choices],
        "dense": table.dense,
        "sampled": list(table.sampled),
        "compared": table.compared,
    }


def _from_json(data: dict[str, Any], device: int) -> Table:
    n, k, w_stride = (_count(data[name]) for name in ("n", "k", "w_stride"))
    key = Key(n, k, _DTYPES[data["dtype"]], w_stride, data["added"], device)
    choices = tuple(
        Choice(path, int(variant), bytes.fromhex(algorithm)) for path, variant, algorithm in data["choices"]
    )
    uppers, sampled = (tuple(_count(rows) for rows in data[name]) for name in ("uppers", "sampled"))
    for choice in choices:
        whole = choice.path != "cublaslt_no_split" or len(choice.algorithm) == cublaslt.ALGORITHM_BYTES
        if choice.path not in _PATHS or not whole:
            raise ValueError(f"the choice {choice.path!r}")
    if not choices or len(uppers) != len(choices) or list(uppers) != sorted(uppers) or not isinstance(key.added, bool):
        raise ValueError("a table whose parts do not fit one another")
    return Table(key, uppers, choices, int(data["dense"]), sampled, _count(data["compared"]))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no positive number")
    return value


@functools.cache
def state(device: int) -> Read | NotRead:
    """The file of this machine, read and taken into use on the first call for a device."""
    where = folder()
    if where is None:
        return NotRead("missing", "there is no home for a cache: set DETINFER_CACHE")
    path = where / FILE
    if not path.is_file():
        return NotRead("missing", f"there is no {path}: run detinfer prove")
    found = read(path, fingerprint(device), device)
    if isinstance(found, Read):
        matmul_table.use(table for table in found.tables if matmul_table.table(table.key) is None)
    return found


def keep(tables: Iterable[Table], device: int, *, force: bool = False) -> tuple[Path, str]:
    """Add tables to the file of this machine: its path, and what became of the tables that it held.

    Those of this environment are kept, unless there are new ones for the same shape; those of another are dropped. Raises
    UsageError where the file is none of detinfer's or damaged, unless ``force``, or where there is no place for it.
    """
    where = folder()
    if where is None:
        raise UsageError("prove: there is no home for a cache: set DETINFER_CACHE to a folder")
    path, here = where / FILE, fingerprint(device)
    before = read(path, here, device)
    if isinstance(before, NotRead) and before.kind == "corrupt" and not force:
        raise UsageError(f"prove: {before.reason}; remove it, or give --force to replace it")
    merged = {table.key: table for table in before.tables} if isinstance(before, Read) else {}
    held = len(merged)
    merged |= {table.key: table for table in tables}
    write(path, merged.values(), here)
    state.cache_clear()
    if isinstance(before, NotRead):
        return path, "" if before.kind == "missing" else before.reason
    return path, f"{held} tables of this environment were there"
