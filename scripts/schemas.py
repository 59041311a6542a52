"""Write the JSON Schemas of the results that --json writes, from the dataclasses that hold them.

    python scripts/schemas.py            write detinfer/reporters/schemas
    python scripts/schemas.py --check    say which file is not what it should be

A key that is added changes the file of the present version; one that goes away or means something else raises SCHEMA and
with it the file's name, and the file before stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

from detinfer.goldens.diff import Diff
from detinfer.goldens.result import SCHEMA, Result
from detinfer.goldens.vectors.result import VectorResult
from detinfer.integrations.server.result import SCHEMA as SERVER_SCHEMA
from detinfer.integrations.server.result import ServerResult

FOLDER = Path(__file__).parents[1] / "detinfer/reporters/schemas"
PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}
RESULTS = {
    "verify": (Result, SCHEMA, "of a golden"),
    "vectors": (VectorResult, SCHEMA, "of a folder of vectors"),
    "diff": (Diff, SCHEMA, "of detinfer diff"),
    "server": (ServerResult, SERVER_SCHEMA, "of detinfer verify URL"),
}


def of(kind: Any, held: dict[str, Any]) -> dict[str, Any]:
    """The schema of values of a type; dataclasses are put into ``held`` and referred to."""
    if kind in PLAIN:
        return dict(PLAIN[kind])
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if kind.__name__ not in held:
            held[kind.__name__] = {}  # it may refer to itself
            held[kind.__name__] = record(kind, held)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [of(one, held) for one in arguments]}
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return {"type": "array", "items": of(arguments[0], held)}
    if origin is tuple:
        size = len(arguments)
        return {
            "type": "array",
            "prefixItems": [of(one, held) for one in arguments],
            "minItems": size,
            "maxItems": size,
        }
    if origin is dict:
        return {"type": "object", "additionalProperties": of(arguments[1], held)}
    raise TypeError(f"no schema for {kind}")


def record(kind: Any, held: dict[str, Any]) -> dict[str, Any]:
    """The schema of a dataclass: exactly its fields."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: of(hints[field.name], held) for field in dataclasses.fields(kind)}
    about = " ".join((kind.__doc__ or "").split("\n\n")[0].split()).replace("``", "")
    return {
        "description": about,
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def schema(name: str) -> dict[str, Any]:
    """The whole schema of one kind of result."""
    kind, version, what = RESULTS[name]
    held: dict[str, Any] = {}
    found = record(kind, held)
    found["properties"]["schema"] = {"const": version}
    if kind is Diff:  # to_json adds it
        found["properties"]["same"] = {"type": "boolean"}
        found["required"] = [*found["properties"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"detinfer:{name}-{version}",
        "title": f"A result {what}, version {version}",
        **found,
        "$defs": held,
    }


def main() -> int:
    """Write, or check, every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    wrong = 0
    for name, (_, version, _) in RESULTS.items():
        file = FOLDER / f"{name}-{version}.json"
        text = json.dumps(schema(name), indent=1) + "\n"
        if check and (not file.is_file() or file.read_text(encoding="utf-8") != text):
            print(f"{file}: not what the results are: run python scripts/schemas.py")
            wrong += 1
        elif not check:
            FOLDER.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
