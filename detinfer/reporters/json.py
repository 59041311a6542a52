"""A result as JSON: keys ``schema``, ``invariance``, ``golden``, ``control``, each judged one with its ``verdict``."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

from detinfer.errors import GoldenError, InfrastructureError
from detinfer.goldens import resume
from detinfer.goldens.inputs import Options
from detinfer.goldens.result import SCHEMA, Divergence


class Result(Protocol):
    """A result of ``verify``, of a golden or of vectors."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""


@dataclass(frozen=True)
class Saved:
    """What of a saved result a divergence is made again from: the golden's path, the sweep's options, the divergences."""

    path: Path
    options: Options
    held: dict[str, Any]

    @property
    def ranks(self) -> int:
        """The number of ranks that it was found on."""
        found: int = self.held.get("consistency", {}).get("ranks", 1)
        return found

    def first(self, part: Literal["invariance", "control"]) -> Divergence | None:
        """The first divergence of that part."""
        found = self.held[part]["first"]
        return None if found is None else Divergence(**{**found, "row": tuple(found["row"])})


def read(path: Path) -> Saved:
    """A result that ``write`` wrote; GoldenError when it is none, or of another schema."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path}: cannot be read as a result of detinfer verify: {error}") from error
    if not isinstance(held, dict) or held.get("schema") != SCHEMA or "sweep" not in held:
        raise GoldenError(f"{path}: no result of this version's detinfer verify of a model: run verify --json again")
    try:
        sweep = held["sweep"]
        sizes = None if sweep["batch_sizes"] is None else tuple(sweep["batch_sizes"])
        options = Options(n_trials=sweep["n_trials"], seed=held["seed"], batch_sizes=sizes)
        return Saved(Path(held["path"]), options, held)
    except (KeyError, TypeError) as error:
        raise GoldenError(f"{path}: damaged ({error!r}): run verify --json again") from error


def read_unfinished(path: Path) -> Saved:
    """The result of an interrupted run, with all of its options; GoldenError when it is none."""
    saved = read(path)
    if saved.held.get("unfinished") is None:
        raise GoldenError(f"{path}: the result of a run that was not interrupted: there is nothing to resume")
    try:
        return Saved(saved.path, resume.options_of(saved.held), saved.held)
    except (KeyError, TypeError) as error:
        raise GoldenError(f"{path}: cannot be resumed: {error!r} is missing or of another kind") from error


SCHEMAS = {"Result": "verify-1", "VectorResult": "vectors-1", "Diff": "diff-1", "ServerResult": "server-1"}
"""The file under ``schemas`` of each kind of result, with the number of its version."""


def schema(result: Result) -> dict[str, Any]:
    """The JSON Schema of what ``write`` writes of a result."""
    file = resources.files("detinfer.reporters") / "schemas" / f"{SCHEMAS[type(result).__name__]}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def write(result: Result, path: Path) -> None:
    """Write ``result`` to ``path``; InfrastructureError when that cannot be done."""
    text = json.dumps(result.to_json(), indent=1, sort_keys=True) + "\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:  # whole or not at all: it may be written over the file that is resumed
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InfrastructureError(f"--json {path}: {error.strerror}; the result was not written") from error
