"""A result as JSON: keys ``schema``, ``invariance``, ``golden``, ``control``, each judged one with its ``verdict``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from detinfer.errors import GoldenError, InfrastructureError
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
    sweep = held["sweep"]
    sizes = None if sweep["batch_sizes"] is None else tuple(sweep["batch_sizes"])
    options = Options(n_trials=sweep["n_trials"], seed=held["seed"], batch_sizes=sizes)
    return Saved(Path(held["path"]), options, held)


def write(result: Result, path: Path) -> None:
    """Write ``result`` to ``path``; InfrastructureError when that cannot be done."""
    text = json.dumps(result.to_json(), indent=1, sort_keys=True) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InfrastructureError(f"--json {path}: {error.strerror}; the result was not written") from error
