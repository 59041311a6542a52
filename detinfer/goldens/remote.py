"""Goldens in remote folders: S3, the Hugging Face hub, whatever fsspec knows. They are copied here before they are read.

Every file is checked against the manifest's size and SHA-256 as it comes, and the manifest against its own digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import fsspec

from detinfer.errors import GoldenError, InfrastructureError, UsageError
from detinfer.goldens import folder, registry
from detinfer.goldens.format import FILES, check_file, load_manifest
from detinfer.goldens.manifest import NAME, digest

_CHUNK = 1 << 22


def is_remote(place: str) -> bool:
    """Whether this is a URL of a folder: ``s3://bucket/goldens/x``, ``hf://datasets/me/goldens/x``."""
    return re.match(r"[a-z][a-z0-9+.-]*://", place) is not None


def fetch(url: str, path: Path, overwrite: bool = False) -> Path:
    """Copy the golden in the remote folder ``url`` to ``path``, whole or not at all.

    Raises GoldenError where there is none, or a file is not what its manifest says; InfrastructureError where the folder
    cannot be reached; UsageError where something stands at ``path``.
    """
    path = folder.destination(path, overwrite, NAME, FILES)
    files, root = _open(url)
    manifest = _manifest(files, root, url)
    with folder.disk(path):
        partial = folder.make_partial(path)
        try:
            for entry in manifest["files"]:
                if not FILES.fullmatch(entry["name"]):
                    raise GoldenError(f"{url}: {entry['name']!r} is not the name of a golden's file")
                _get(files, f"{root}/{entry['name']}", partial / entry["name"], url)
                check_file(partial / entry["name"], entry)
            folder.write_file(partial / NAME, _read(files, f"{root}/{NAME}", url))
            folder.put_in_place(partial, path)
        except BaseException:
            folder.remove(partial)
            raise
    return path


def cached(url: str) -> Path:
    """A copy of the golden at ``url``, fetched now unless this very one was fetched before."""
    files, root = _open(url)
    manifest = _manifest(files, root, url)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = root.rstrip("/").rpartition("/")[2] or "golden"
    kept = Path(
        base, "detinfer", "goldens", hashlib.sha256(url.encode()).hexdigest()[:12], manifest["digest"][:12], name
    )
    return kept if (kept / NAME).exists() else fetch(url, kept)


def push(path: Path, url: str, overwrite: bool = False) -> None:
    """Copy the golden at ``path`` to the remote folder ``url``, its manifest last: without one it is no golden.

    Raises GoldenError where it is damaged, UsageError where another golden stands there and ``overwrite`` is not set.
    """
    problem = registry.problem(path)
    if problem is not None:
        raise GoldenError(f"{path}: not pushed: {problem}")
    own = load_manifest(path)
    files, root = _open(url)
    try:
        there = files.exists(f"{root}/{NAME}")
        if there and json.loads(files.cat_file(f"{root}/{NAME}")).get("digest") == own["digest"]:
            return
        if there and not overwrite:
            raise UsageError(f"{url}: another golden is there; push to another place, or replace it with --force")
        files.makedirs(root, exist_ok=True)
        if there:
            files.rm_file(f"{root}/{NAME}")
        for file in sorted(path.iterdir(), key=lambda file: file.name == NAME):
            if FILES.fullmatch(file.name):
                files.put_file(str(file), f"{root}/{file.name}")
    except (OSError, ValueError) as error:
        raise InfrastructureError(f"{url}: {error}; the golden there may not be whole: push it again") from error


def _open(url: str) -> tuple[Any, str]:
    try:
        found = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the message names the package to install
        raise UsageError(f"{url}: {error}; the extra 'remote' installs the packages for s3:// and hf://") from error
    except OSError as error:
        raise InfrastructureError(f"{url}: {error}") from error
    return found[0], str(found[1]).rstrip("/")


def _manifest(files: Any, root: str, url: str) -> dict[str, Any]:
    try:
        held = json.loads(_read(files, f"{root}/{NAME}", url))
        sound = held["digest"] == digest(held) and isinstance(held["files"], list)
    except (ValueError, KeyError, TypeError) as error:
        raise GoldenError(f"{url}/{NAME}: not the manifest of a golden: {error!r}") from error
    if not sound:
        raise GoldenError(f"{url}/{NAME}: its content does not match its digest: it was edited or damaged")
    found: dict[str, Any] = held
    return found


def _read(files: Any, file: str, url: str) -> bytes:
    try:
        found: bytes = files.cat_file(file)
    except FileNotFoundError as error:
        raise GoldenError(
            f"{url}: is not a golden, or does not exist: there is no {file.rpartition('/')[2]}"
        ) from error
    except OSError as error:
        raise InfrastructureError(f"{url}: {error}") from error
    return found


def _get(files: Any, file: str, path: Path, url: str) -> None:
    try:
        with files.open(file, "rb") as source, path.open("wb") as target:
            while chunk := source.read(_CHUNK):
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
    except FileNotFoundError as error:
        raise GoldenError(f"{url}: {file.rpartition('/')[2]} is missing; the manifest names it") from error
