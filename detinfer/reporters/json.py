"""A result as JSON: keys ``schema``, ``invariance``, ``golden``, ``control``, each judged one with its ``verdict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from detinfer.errors import InfrastructureError


class Result(Protocol):
    """A result of ``verify``, of a golden or of vectors."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""


def write(result: Result, path: Path) -> None:
    """Write ``result`` to ``path``; InfrastructureError when that cannot be done."""
    text = json.dumps(result.to_json(), indent=1, sort_keys=True) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InfrastructureError(f"--json {path}: {error.strerror}; the result was not written") from error
