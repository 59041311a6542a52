"""The goldens in a folder: what each is of, whether its environment is this one, whether it is whole."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from detinfer import environment, native, tensor_file
from detinfer.errors import DetinferError, UsageError
from detinfer.goldens.format import Golden, load_manifest
from detinfer.goldens.manifest import NAME, Manifest
from detinfer.goldens.vectors.file import is_vectors, read

_LEFT = re.compile(r"\..+\.partial-\d+(-\d+)?")


@dataclass(frozen=True)
class Entry:
    """One golden. ``environment`` is a digest of the fields that make one stale; ``here`` says whether they are this
    machine's (of vectors always: they belong to no environment). ``problem`` is why a manifest cannot be read,
    ``pending`` whether it waits to be accepted (``pending``)."""

    path: Path
    of: str
    dtype: str
    ranks: int
    environment: str
    here: bool
    bytes: int
    reason: str
    problem: str = ""
    pending: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "path": str(self.path)}


def environment_key(found: environment.Environment) -> str:
    """12 hex digits of SHA-256 over the fields that make a golden stale, keys sorted."""
    held = {name: value for name, value in found.to_json().items() if name in environment.STALE_FIELDS}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:12]


def entries(folder: Path) -> list[Entry]:
    """Every golden in ``folder`` and below, by path. UsageError when there is no such folder."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the one that holds the goldens")
    found = [_entry(path.parent) for path in sorted(folder.rglob(NAME)) if not _LEFT.fullmatch(path.parent.name)]
    return [replace(entry, pending=entry.path.name.endswith(".pending")) for entry in found]


def _entry(path: Path) -> Entry:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    try:
        if is_vectors(path):
            held = load_manifest(path)
            kinds = " ".join(sorted({case["dtype"] for case in held["cases"]}))
            return Entry(path, f"vectors:{held['operation']}", kinds, 1, "any", True, size, held["reason"])
        manifest = Manifest.from_json(load_manifest(path), str(path / NAME))
    except (DetinferError, KeyError, TypeError) as error:
        return Entry(path, "", "", 1, "", False, size, "", f"unreadable: {error}")
    then = environment.Environment.from_json(manifest.environment)
    differs = _differences(then)
    problem = f"{len(differs)} fields differ" if differs else ""
    target = manifest.target
    return Entry(
        path,
        target["spec"],
        target["dtype"],
        manifest.ranks,
        environment_key(then),
        not differs,
        size,
        manifest.reason,
        problem,
    )


def capture_like(then: environment.Environment) -> environment.Environment:
    """This machine, with the libraries and the kind of device that a recording had."""
    try:
        return environment.capture(native.isa(), tuple(then.libraries), "cuda" if then.gpu else "cpu")
    except (RuntimeError, AssertionError):  # recorded on a GPU, and there is none here
        return environment.capture(native.isa(), tuple(then.libraries))


def _differences(then: environment.Environment) -> tuple[tuple[str, str, str], ...]:
    return environment.differences(then, capture_like(then))


def described(path: Path) -> Iterator[tuple[str, str]]:
    """(what, value) of a golden, line by line; GoldenError when it cannot be read."""
    if is_vectors(path):
        held, cases = read(path)
        yield "vectors", f"{held['operation']}: {len(cases)}"
        yield "reason", held["reason"]
        return
    golden = Golden.read(path)
    manifest = golden.manifest
    yield "target", f"{manifest.target['spec']} ({manifest.target['class']}, {manifest.target['dtype']})"
    yield "weights", manifest.target["weights_digest"]
    yield "policy", " ".join(f"{key}={value}" for key, value in manifest.policy.items() if value)
    for number, prompt in enumerate(manifest.inputs["prompts"]):
        text = prompt["text"] if prompt["text"] is None else repr(prompt["text"][:60])
        yield f"prompt {number}", f"{len(prompt['tokens'])} tokens {text or ''}"
    kinds: dict[str, int] = {}
    for unit in manifest.units:
        kind = "skipped" if unit["skipped"] else unit["kind"]
        kinds[kind] = kinds.get(kind, 0) + 1
    yield "units", ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    yield "calls", str(sum(len(unit["calls"]) for unit in manifest.units))
    stored = sum(entry["stored"] for entry in manifest.tensors.values())
    yield "tensors", f"{len(manifest.tensors)}, values of {stored} ({manifest.tensors_mode})"
    refused = sum(not decision["accepted"] for decision in manifest.decisions)
    portable = sum(decision["portable"] for decision in manifest.decisions)
    yield "decisions", f"{len(manifest.decisions)}, {portable} portable, {refused} refused"
    yield "recorded by", f"detinfer {manifest.detinfer}: {manifest.command}"
    yield "reason", manifest.reason or "none was given"
    differs = _differences(environment.Environment.from_json(manifest.environment))
    for name, then, now in differs:
        yield "differs", f"{name}: recorded {then}, here {now}"
    yield (
        "here",
        "the recorded environment" if not differs else "another environment: stale, but for portable operations",
    )


def at(paths: Sequence[Path]) -> list[Path]:
    """The goldens that ``paths`` are, or that files among them belong to, or that lie below folders among them; each once.

    A file ``*.safetensors`` without a manifest beside it is one of the pytest plugin, a golden by itself.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_file():
            found[path.parent if (path.parent / NAME).exists() or path.suffix != ".safetensors" else path] = None
        elif (path / NAME).exists() or not path.is_dir():
            found[path] = None
        else:
            inside = [file.parent for file in sorted(path.rglob(NAME)) if not _LEFT.fullmatch(file.parent.name)]
            alone = [file for file in sorted(path.rglob("*.safetensors")) if not _held(file, path)]
            if not inside and not alone:
                raise UsageError(f"{path}: there is no golden in it")
            found |= dict.fromkeys([*inside, *alone])
    return list(found)


def _held(file: Path, folder: Path) -> bool:
    """Whether a file belongs to a golden in ``folder``, or to what a killed writer left."""
    return (file.parent / NAME).exists() or any(_LEFT.fullmatch(part) for part in file.relative_to(folder).parts)


def problem(path: Path) -> str | None:
    """Why a golden is not whole, or None: every file, and every stored tensor, is read and hashed."""
    try:
        if path.suffix == ".safetensors" and path.is_file():
            return _problem_of_plugin(path)
        if is_vectors(path):
            read(path)
            return None
        golden = Golden.read(path)
        for digest, entry in golden.manifest.tensors.items():
            golden.row_digests(digest)
            if entry["stored"]:
                golden.tensor(digest)
    except DetinferError as error:
        return str(error)
    return None


def _problem_of_plugin(path: Path) -> str | None:
    """Why a file of the pytest plugin cannot be read; it has no digests of its own."""
    try:
        with tensor_file.reader(path) as file:
            held = json.loads((file.metadata() or {})[tensor_file.METADATA_KEY])
        environment.Environment.from_json(held, str(path))
    except (ValueError, KeyError, DetinferError) as error:
        return f"no golden: its manifest.json is missing, and it is none of the pytest plugin: {error}"
    return None


def leftovers(folder: Path) -> list[Path]:
    """Folders that writers left behind when they were killed."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the one that holds the goldens")
    return sorted(path for path in folder.rglob(".*") if path.is_dir() and _LEFT.fullmatch(path.name))


def remove(path: Path) -> None:
    """Remove a folder that ``leftovers`` named."""
    if not _LEFT.fullmatch(path.name):
        raise UsageError(f"{path}: not what a killed writer leaves behind: it is not removed")
    shutil.rmtree(path)
