"""Goldens that changed: the new one waits beside the old one until a person accepts it.

goldens/NAME/KEY             the golden of one environment, KEY being ``registry.environment_key``
goldens/NAME/KEY.pending     what was recorded there since and is not the same
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from detinfer import environment
from detinfer.errors import GoldenError, UsageError
from detinfer.goldens import folder
from detinfer.goldens.diff import diff
from detinfer.goldens.format import FILES, Golden, load_manifest
from detinfer.goldens.manifest import NAME, canonical, digest
from detinfer.goldens.registry import capture_like, environment_key

SUFFIX = ".pending"
_KEY = re.compile(r"[0-9a-f]{12}")

# What a golden is told apart by is everything else.
_ABOUT = ("command", "reason", "notes", "detinfer", "files", "digest")


def pending(path: Path) -> Path:
    """Where the golden waits that may take the place of the one at ``path``."""
    path = Path(os.path.realpath(path))
    return path.with_name(path.name + SUFFIX)


def is_pending(path: Path) -> bool:
    """Whether this is the folder of a golden that waits."""
    return path.name.endswith(SUFFIX)


def place(goldens: Path, name: str, found: environment.Environment) -> Path:
    """The folder of a name's golden in one environment."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".") or name.endswith(SUFFIX):
        raise UsageError(
            f"--name {name}: letters, digits, -, _ and . with none of them in front, and not {SUFFIX} behind"
        )
    return goldens / name / environment_key(found)


def resolve(path: Path) -> Path:
    """The golden that ``path`` means here: itself, or of a folder with a golden by environment the one of this one.

    Where there is none of this environment: the one whose operations are all portable, else the first, which is stale
    then. A folder without goldens is returned as it is.
    """
    if (path / NAME).exists() or not path.is_dir():
        return path
    kept = sorted(one for one in path.iterdir() if _KEY.fullmatch(one.name) and (one / NAME).exists())
    for one in kept:
        then = environment.Environment.from_json(load_manifest(one)["environment"])
        if one.name == environment_key(capture_like(then)):
            return one
    portable = (one for one in kept if all(made["portable"] for made in load_manifest(one).get("decisions", ())))
    return next(portable, kept[0] if kept else path)


def compare(path: Path) -> Literal["new", "same", "changed"]:
    """How the golden that waits beside ``path`` differs from the one there, apart from who recorded it and why."""
    if not (path / NAME).exists():
        return "new"
    return "same" if _content(path) == _content(pending(path)) else "changed"


def _content(path: Path) -> str:
    held = load_manifest(path)
    return digest({key: value for key, value in held.items() if key not in _ABOUT})


def changes(path: Path) -> Iterator[str]:
    """What the golden that waits would change, in a few lines; nothing where none waits."""
    waiting = pending(path)
    if not (waiting / NAME).exists():
        return
    yield f"{waiting}"
    if not (path / NAME).exists():
        yield "there is no golden yet"
        return
    found = diff(Golden.read(path), Golden.read(waiting))
    for name, then, now in [*found.environment, *found.model, *found.policy]:
        yield f"{name}: {then} becomes {now}"
    yield from found.inputs
    changed = [unit for unit in found.units if unit.state != "same"]
    yield f"{len(changed)} of {len(found.units)} units have other bytes" + (
        f", first {found.first}" if found.first else ""
    )
    for prompt, step, one, other in found.tokens[:3]:
        yield f"prompt {prompt}: token {one} at step {step} becomes {other}"


def accept(path: Path, reason: str, in_ci: bool = False) -> Path:
    """Put the golden that waits beside ``path`` in its place, with ``reason`` in its manifest.

    Raises UsageError without a reason, and where the variable CI is set and ``in_ci`` is not: a person accepts.
    GoldenError where none waits, or where it is damaged.
    """
    if not reason.strip():
        raise UsageError("golden accept: a golden that changes says why: --reason TEXT")
    if ci() and not in_ci:
        raise UsageError("golden accept: not in CI (the variable CI is set): a person accepts; --in-ci if it is meant")
    path, waiting = Path(os.path.realpath(path)), pending(path)
    if not (waiting / NAME).exists():
        raise GoldenError(f"{path}: no golden waits beside it ({waiting})")
    golden = Golden.read(waiting)
    for name, entry in golden.manifest.tensors.items():
        if entry["stored"]:
            golden.tensor(name)
    if path.exists():
        folder.destination(path, True, NAME, FILES)
    manifest = replace(golden.manifest, reason=reason)
    with folder.disk(path):
        partial = folder.make_partial(path)
        try:
            for file in waiting.iterdir():
                if file.name != NAME:
                    shutil.copyfile(file, partial / file.name)
            folder.write_file(partial / NAME, canonical(manifest.to_json()))
            folder.put_in_place(partial, path)
        except BaseException:
            folder.remove(partial)
            raise
        folder.remove(waiting)
    return path


def reject(path: Path) -> Path:
    """Remove the golden that waits beside ``path``; GoldenError where there is none."""
    waiting = pending(path)
    if not (waiting / NAME).exists():
        raise GoldenError(f"{path}: no golden waits beside it ({waiting})")
    folder.destination(waiting, True, NAME, FILES)
    folder.remove(waiting)
    return waiting


def ci() -> bool:
    """Whether this process runs in a continuous integration: the variable CI, as all of them set it."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false", "no")
