"""The manifest of a golden: everything about it but the tensors' values, as plain JSON values.

Arguments and outputs are JSON trees whose tensors are written ``{"tensor": digest}``; here they are looked at for
those digests and for nothing else. docs/concepts/goldens.md tells what each key means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from detinfer.environment import Environment
from detinfer.errors import GoldenError
from detinfer.goldens.schema import JSON, Each, Hex, Maybe, Null, Word, check

SCHEMA = 1
"""Raised by one when a reader of the schema before could misread a manifest."""

NAME = "manifest.json"

TensorsMode = Literal["full", "slice", "none"]

DIGEST = Hex()

DECISION = {
    "op": str,
    "dtypes": [str],
    "accepted": bool,
    "path": str,
    "reason": str,
    "proof": Null({"subject": str, "against": str, "cases": int, "digest": str}),
    "portable": bool,
}

UNIT = {
    "name": str,
    "kind": Word("leaf", "attention", "block"),
    "type": str,
    "batch": JSON,
    "calls": [{"request": int, "step": int, "arguments": JSON, "outputs": JSON}],
    "skipped": Null(str),
    "rank": Maybe(int),
}

SHAPE: dict[str, Any] = {
    "schema": int,
    "detinfer": str,
    "environment": JSON,  # Environment.from_json is as strict
    "target": {
        "spec": str,
        "kind": Word("causal_lm", "module"),
        "class": str,
        "dtype": str,
        "weights_digest": DIGEST,
        "config_digest": DIGEST,
    },
    "inputs": {
        "digest": DIGEST,
        "seed": int,
        "prompts": [{"text": Null(str), "tokens": [int]}],
        "requests": [JSON],
        "decode_steps": int,
    },
    "policy": JSON,
    "decisions": [DECISION],
    "tensors_mode": Word("full", "slice", "none"),
    "units": [UNIT],
    "outputs": {"tokens": [[int]], "results": [[JSON]], "batch": JSON},
    "notes": [str],
    "command": str,
    "reason": str,
    "tensors": Each({"dtype": str, "shape": [int], "stored": bool}, keys=Hex.PATTERN),
    "files": [{"name": str, "size": int, "sha256": DIGEST}],
    "digest": DIGEST,
    "ranks": Maybe(int),
}
"""The shape of a manifest's JSON, key by key."""


@dataclass(frozen=True)
class Manifest:
    """One golden's manifest; ``SHAPE`` gives the JSON shape of every field.

    ``ranks`` is the tensor-parallel size; it, and the ``rank`` of a unit, are written where it is more than 1. The three
    before it are the writer's: the tensors that the manifest names, the files that hold them, and the digest of
    all the rest.
    """

    detinfer: str
    environment: dict[str, Any]
    target: dict[str, Any]
    inputs: dict[str, Any]
    policy: dict[str, Any]
    decisions: list[dict[str, Any]]
    tensors_mode: TensorsMode
    units: list[dict[str, Any]]
    outputs: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    command: str = ""
    reason: str = ""
    schema: int = SCHEMA
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    digest: str = ""
    ranks: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the digest computed anew; GoldenError names a value that has no place in a manifest."""
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        if self.ranks == 1:
            del data["ranks"]
        data["digest"] = "0" * 64  # of the right shape until there is something to digest
        _check(data, NAME)
        data["digest"] = digest(data)
        return data

    @classmethod
    def from_json(cls, data: Any, where: str = NAME) -> Manifest:
        """Read a manifest strictly. GoldenError for another schema, an edit, or a value that has no place in it."""
        if not isinstance(data, dict) or type(data.get("schema")) is not int:
            raise GoldenError(f"{where}: not the manifest of a golden: it has no schema number")
        if data["schema"] > SCHEMA:
            raise GoldenError(
                f"{where}: schema {data['schema']} was made by a newer detinfer ({data.get('detinfer', 'unknown')}); "
                f"this one reads schema {SCHEMA}: upgrade detinfer"
            )
        if data["schema"] < SCHEMA:
            raise GoldenError(
                f"{where}: schema {data['schema']} is older than this detinfer reads ({SCHEMA}): record the golden again"
            )
        if data.get("digest") != digest(data):
            raise GoldenError(f"{where}: its content does not match its digest: it was edited or damaged")
        _check(data, where)
        return cls(**data)

    def references(self) -> Iterator[str]:
        """Digest of every tensor that inputs, units and outputs name; a digest comes as often as it is named."""
        yield from tensor_references(self.inputs["requests"])
        for unit in self.units:
            yield from tensor_references(unit["calls"])
        yield from tensor_references(self.outputs["results"])


def _check(data: dict[str, Any], where: str) -> None:
    check(data, SHAPE, where)
    Environment.from_json(data["environment"], f"{where}.environment")


def canonical(data: Any) -> bytes:
    """The bytes of a manifest file: keys sorted, indented by one, ASCII, a line feed at the end."""
    return (json.dumps(data, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def digest(data: dict[str, Any]) -> str:
    """SHA-256 of the manifest without ``digest``: keys sorted, ASCII, no space anywhere."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    try:
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except ValueError as error:
        raise GoldenError(f"{NAME}: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_references(tree: Any) -> Iterator[str]:
    """The digests in a JSON tree: the value of every object that has ``tensor`` as its only key."""
    if isinstance(tree, dict):
        if tree.keys() == {"tensor"} and isinstance(tree["tensor"], str):
            yield tree["tensor"]
        else:
            for item in tree.values():
                yield from tensor_references(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensor_references(item)
