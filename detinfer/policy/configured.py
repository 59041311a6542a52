"""The policy of a project: what code says, then ``[tool.detinfer]`` in pyproject.toml, then the environment.

    [tool.detinfer]
    scope = "batch"
    place = "here"
    allow = ["aten::cumsum"]
    uncovered = "refuse"
    reductions = "merged"

The environment's names are ``DETINFER_SCOPE``, ``DETINFER_PLACE``, ``DETINFER_ALLOW`` (names separated by commas),
``DETINFER_UNCOVERED`` and ``DETINFER_REDUCTIONS``. Each field is taken from the strongest place that gives it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detinfer.errors import UsageError
from detinfer.policy.policy import Guarantee, Policy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLES = {
    "scope": "DETINFER_SCOPE",
    "place": "DETINFER_PLACE",
    "allow": "DETINFER_ALLOW",
    "uncovered": "DETINFER_UNCOVERED",
    "reductions": "DETINFER_REDUCTIONS",
}
"""The fields, and the variables that give them."""


def configured(
    *, folder: Path | None = None, environment: Mapping[str, str] | None = None, **code: Any
) -> tuple[Policy, dict[str, str]]:
    """(the policy, where each field that is not a default came from: ``code``, a file's path or a variable's name).

    ``code`` takes the fields; None counts as not given. pyproject.toml is looked for in ``folder`` (the current one) and
    above it, the first that is found counts. Raises UsageError, naming the place, for a field that does not exist or a
    value that cannot be.
    """
    fields: dict[str, Any] = {}
    origins: dict[str, str] = {}
    found, file = _from_file(Path.cwd() if folder is None else folder)
    variables = os.environ if environment is None else environment
    given = [
        ({name: variables[key] for name, key in VARIABLES.items() if key in variables}, None),
        (found, str(file)),
        ({name: value for name, value in code.items() if value is not None}, "code"),
    ]
    for values, place in given:
        for name, value in values.items():
            origin = VARIABLES.get(name, name) if place is None else place
            if name not in VARIABLES:
                raise UsageError(f"{origin}: a policy has no {name!r}; it has {', '.join(VARIABLES)}")
            fields[name], origins[name] = _checked(name, value, origin), origin
    guarantee = Guarantee(fields.pop("scope", "batch"), fields.pop("place", "here"))
    return Policy(guarantee, **fields), origins


def _checked(name: str, value: Any, origin: str) -> Any:
    if name == "allow":
        if isinstance(value, str) and origin != "code" and origin == VARIABLES["allow"]:
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, str) or not all(isinstance(part, str) for part in value):
            raise UsageError(f"{origin}: allow is a list of operations, not {value!r}")
        value = tuple(sorted(set(value)))
    try:
        if name in ("scope", "place"):
            Guarantee(**{name: value})
        else:
            Policy(**{name: value})
    except (UsageError, TypeError) as error:
        raise UsageError(f"{origin}: {error}") from None
    return value


def _from_file(folder: Path) -> tuple[dict[str, Any], Path | None]:
    for place in (folder, *folder.resolve().parents):
        file = place / "pyproject.toml"
        if file.is_file():
            try:
                read = tomllib.loads(file.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UsageError(f"{file}: {error}") from None
            found = read.get("tool", {}).get("detinfer", {})
            if not isinstance(found, dict):
                raise UsageError(f"{file}: tool.detinfer is a table")
            return found, file
    return {}, None
