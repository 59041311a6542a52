"""Vectors on disk: a folder like a golden's, with ``manifest.json`` and one safetensors file, written whole or not at all.

    schema, detinfer, kind ("vectors"), operation, cases, command, reason, files, digest

A case names its tensors by their digest, which is their name in the file as well. Vectors come from the reference, so
no environment is part of them: they are never stale.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import detinfer
from detinfer import bits, tensor_file
from detinfer.errors import GoldenError, UsageError
from detinfer.goldens import folder
from detinfer.goldens.format import FILES, SINGLE, check_file, load_manifest
from detinfer.goldens.manifest import NAME, SCHEMA, canonical, digest
from detinfer.goldens.schema import JSON, Each, Hex, Word, check
from detinfer.goldens.vectors.case import OPERATIONS, Case

KIND = "vectors"

SHAPE: dict[str, Any] = {
    "schema": int,
    "detinfer": str,
    "kind": Word(KIND),
    "operation": Word(*OPERATIONS),
    "cases": [
        {
            "name": str,
            "dtype": str,
            "ranks": int,
            "arguments": JSON,
            "parts": [Hex()],
            "inputs": Each(Hex()),
            "outputs": Each(Hex()),
        }
    ],
    "command": str,
    "reason": str,
    "files": [{"name": str, "size": int, "sha256": Hex()}],
    "digest": Hex(),
}
"""The shape of a manifest's JSON, key by key."""


def is_vectors(path: Path) -> bool:
    """Whether a folder holds vectors; GoldenError when it holds no manifest at all."""
    data = load_manifest(path)
    return isinstance(data, dict) and data.get("kind") == KIND


def write(path: Path, operation: str, cases: list[Case], *, reason: str, command: str, overwrite: bool) -> Path:
    """Write the vectors of ``operation``; UsageError without a reason, or where something stands that must stay."""
    if not reason.strip():
        raise UsageError(
            f"vectors:{operation}: vectors say what every machine must give, so a reason is kept with them: --reason"
        )
    path = folder.destination(path, overwrite, NAME, FILES)
    held: dict[str, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> str:
        name = bits.digest(tensor)
        held[name] = tensor
        return name

    described = [
        {
            "name": case.name,
            "dtype": case.dtype,
            "ranks": case.ranks,
            "arguments": case.arguments,
            "parts": [keep(part) for part in case.parts],
            "inputs": {name: keep(tensor) for name, tensor in case.inputs.items()},
            "outputs": {name: keep(tensor) for name, tensor in case.outputs.items()},
        }
        for case in cases
    ]
    with folder.disk(path):
        partial = folder.make_partial(path)
        try:
            written = tensor_file.write(partial / SINGLE, held)
            data: dict[str, Any] = {
                "schema": SCHEMA,
                "detinfer": detinfer.__version__,
                "kind": KIND,
                "operation": operation,
                "cases": described,
                "command": command,
                "reason": reason,
                "files": [{"name": SINGLE, "size": written.size, "sha256": written.sha256}],
            }
            data["digest"] = digest(data)
            check(data, SHAPE, NAME)
            folder.write_file(partial / NAME, canonical(data))
            folder.put_in_place(partial, path)
        except BaseException:
            folder.remove(partial)
            raise
    return path


def read(path: Path) -> tuple[dict[str, Any], list[Case]]:
    """The manifest and the cases, every tensor hashed again; GoldenError for anything missing, edited or unknown."""
    path = Path(path)
    where = str(path / NAME)
    data = load_manifest(path)
    if not isinstance(data, dict) or data.get("kind") != KIND or type(data.get("schema")) is not int:
        raise GoldenError(f"{where}: not the manifest of vectors")
    if data["schema"] != SCHEMA:
        raise GoldenError(f"{where}: schema {data['schema']}; this detinfer ({detinfer.__version__}) reads {SCHEMA}")
    if data.get("digest") != digest(data):
        raise GoldenError(f"{where}: its content does not match its digest: it was edited or damaged")
    check(data, SHAPE, where)
    tensors: dict[str, torch.Tensor] = {}
    for entry in data["files"]:
        file = path / entry["name"]
        if entry["name"] != SINGLE:
            raise GoldenError(f"{where}: {entry['name']!r} is not the name of its tensor file")
        check_file(file, entry)
        try:
            reader = tensor_file.reader(file)
            # Clones: what lies in the mapped file is at any address.
            tensors.update({name: reader.get_tensor(name).clone() for name in reader.keys()})  # noqa: SIM118 no dict
        except ValueError as error:
            raise GoldenError(f"{file}: not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if bits.digest(tensor) != name:
            raise GoldenError(f"{path / SINGLE}: the tensor {name} does not match its digest: the file has changed")

    def find(name: str) -> torch.Tensor:
        if name not in tensors:
            raise GoldenError(f"{where}: names the tensor {name}, which {SINGLE} does not hold")
        return tensors[name]

    cases = [
        Case(
            entry["name"],
            entry["dtype"],
            entry["ranks"],
            entry["arguments"],
            [find(name) for name in entry["parts"]],
            {key: find(name) for key, name in entry["outputs"].items()},
            {key: find(name) for key, name in entry["inputs"].items()},
        )
        for entry in data["cases"]
    ]
    return data, cases


def describe(data: dict[str, Any]) -> str:
    """``all_reduce: 1008 vectors``, for a line of output."""
    return f"{data['operation']}: {len(data['cases'])} vectors; {json.dumps(data['reason'], ensure_ascii=False)}"
