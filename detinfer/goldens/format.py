"""A golden on disk: a folder with ``manifest.json`` and safetensors files, written whole or not at all.

Tensors are kept under their digest, so equal ones are kept once. Beside each, and in place of each that is not
stored, ``<digest>.rows`` holds the digests of its rows. docs/concepts/goldens.md describes the format.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from detinfer import bits, tensor_file
from detinfer.errors import GoldenError, InfrastructureError
from detinfer.goldens import folder
from detinfer.goldens.manifest import NAME, Manifest, canonical
from detinfer.goldens.spool import Spool

SHARD_BYTES = 1 << 30
SHARD_ENTRIES = 200_000
"""A file holds fewer entries than this: safetensors allows a header of 100 MB."""

ROWS = ".rows"
SINGLE = "tensors.safetensors"
SHARD = "tensors-{:05d}.safetensors"
INDEX = "tensors.safetensors.index.json"
FILES = re.compile(r"manifest\.json|tensors(-\d{5})?\.safetensors|tensors\.safetensors\.index\.json")
"""The names of a golden's own files."""


class GoldenWriter:
    """Collects tensors, then writes the folder ``path`` in one step.

    Files are written to a folder beside ``path`` and renamed into place by ``commit``: an exception, a kill or a full
    disk leaves what was at ``path`` before. A tensor is on the disk when ``add`` returns, and none is held in memory; a
    file has ``shard_bytes`` of them or one that is larger. As a context manager it removes what is left when the block
    ends without ``commit``.

    Raises UsageError when ``path`` is a golden and ``overwrite`` is False, or something else than a golden that is
    not empty; InfrastructureError when the disk refuses.
    """

    def __init__(self, path: Path, overwrite: bool = False, shard_bytes: int | None = None) -> None:
        self.path = folder.destination(Path(path), overwrite, NAME, FILES)
        self._overwrite = overwrite
        self._shard_bytes = shard_bytes or SHARD_BYTES
        self._partial: Path | None = None
        self._tensors: dict[str, dict[str, Any]] = {}
        self._waiting: Spool | None = None
        self._files: list[dict[str, Any]] = []
        self._index: dict[str, str] = {}
        self._total = 0

    @bits.unseen
    def add(self, t: torch.Tensor, store: bool) -> str:
        """Take note of a tensor and return its digest; its values are kept (copied) only where ``store`` is set."""
        if store:
            tensor_file.check_dtype(t.dtype, f"{self.path}: a tensor to store")
        name = bits.digest(t)
        entry = self._tensors.get(name)
        if entry is None:
            entry = {"dtype": bits.dtype_name(t.dtype), "shape": list(t.shape), "stored": False}
            self._wait(name + ROWS, bits.row_digests(t))
            self._tensors[name] = entry
        if store and not entry["stored"]:
            self._wait(name, t)
            entry["stored"] = True
        return name

    def _wait(self, name: str, t: torch.Tensor) -> None:
        size = t.numel() * t.dtype.itemsize
        held = self._waiting
        if held and (held.size + size > self._shard_bytes or len(held) >= SHARD_ENTRIES):
            self._write(SHARD.format(len(self._files) + 1))
        try:
            with folder.disk(self.path):
                self._spool().put(name, t)
        except BaseException:
            self.close()
            raise

    def _spool(self) -> Spool:
        if self._partial is None:
            self._partial = folder.make_partial(self.path)
        if self._waiting is None:
            self._waiting = Spool(self._partial / "waiting")
        return self._waiting

    def _write(self, name: str) -> None:
        try:
            with folder.disk(self.path):
                held = self._spool()
                assert self._partial is not None
                written = tensor_file.write(self._partial / name, held)
                self._index.update(dict.fromkeys(held, name))
                self._total += held.size
                held.close()
        except BaseException:
            self.close()
            raise
        self._waiting = None
        self._files.append({"name": name, "size": written.size, "sha256": written.sha256})

    def kept(self, digest: str) -> torch.Tensor | None:
        """A tensor that was added and stored, where it is still at hand; for a message."""
        if self._waiting is not None and digest in self._waiting:
            return self._waiting[digest].clone()
        if self._partial is None or digest not in self._index:
            return None
        found: torch.Tensor = tensor_file.reader(self._partial / self._index[digest]).get_tensor(digest).clone()
        return found

    def commit(self, manifest: Manifest) -> Path:
        """Write everything and rename it to ``path``; ``manifest`` gets its tensors, files and digest here.

        Raises GoldenError when the manifest names a tensor that was never added or holds a value that has no place in
        it, InfrastructureError when the disk refuses; then nothing has changed at ``path``.
        """
        try:
            unknown = sorted(set(manifest.references()) - self._tensors.keys())
            if unknown:
                raise GoldenError(f"{NAME}: names {len(unknown)} tensors that were never added, first {unknown[0]}")
            self._write(SHARD.format(len(self._files) + 1) if self._files else SINGLE)
            assert self._partial is not None
            text = canonical(replace(manifest, tensors=self._tensors, files=self._files).to_json())
            with folder.disk(self.path):
                if len(self._files) > 1:
                    index = {"metadata": {"total_size": self._total}, "weight_map": self._index}
                    folder.write_file(self._partial / INDEX, canonical(index))
                folder.write_file(self._partial / NAME, text)
                # Once more, for what has come to stand there since this writer was made.
                folder.destination(self.path, self._overwrite, NAME, FILES)
                folder.put_in_place(self._partial, self.path)
            self._partial = None
        finally:
            self.close()
        return self.path

    def close(self) -> None:
        """Remove what was written and not committed."""
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        if self._partial is not None:
            folder.remove(self._partial)
            self._partial = None

    def __enter__(self) -> GoldenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class Golden:
    """A golden that was read whole: manifest and files have been checked against their digests."""

    def __init__(self, path: Path, manifest: Manifest, readers: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._readers = readers

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Read the folder ``path``; GoldenError, with the file's name, when it is missing, damaged or too new."""
        path = Path(path)
        manifest = Manifest.from_json(load_manifest(path), str(path / NAME))
        readers: dict[str, Any] = {}
        for entry in manifest.files:
            file = path / entry["name"]
            if not FILES.fullmatch(entry["name"]) or entry["name"] in (NAME, INDEX):
                raise GoldenError(f"{path / NAME}: {entry['name']!r} is not the name of a tensor file")
            check_file(file, entry)
            try:
                reader = tensor_file.reader(file)
            except ValueError as error:
                raise GoldenError(f"{file}: not a safetensors file: {error}") from error
            readers.update(dict.fromkeys(reader.keys(), (reader, file)))
        golden = cls(path, manifest, readers)
        golden._check_tensors()
        golden._check_index()
        return golden

    def _check_index(self) -> None:
        """The index is for other readers; goldens of one file, and older ones, have none."""
        try:
            held = json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GoldenError(f"{self.path / INDEX}: not an index of safetensors files: {error!r}") from error
        if held != {name: file.name for name, (_, file) in self._readers.items()}:
            raise GoldenError(f"{self.path / INDEX}: names other tensors than the files hold: it was edited or damaged")

    def _check_tensors(self) -> None:
        named = set(self.manifest.references())
        wanted = {name + ROWS for name in self.manifest.tensors}
        wanted |= {name for name, entry in self.manifest.tensors.items() if entry["stored"]}
        for name in sorted(named - self.manifest.tensors.keys()):
            raise GoldenError(f"{self.path / NAME}: names the tensor {name}, which it does not list")
        for name in sorted(wanted ^ self._readers.keys()):
            problem = "is missing from the files" if name in wanted else "is in the files and not in the manifest"
            raise GoldenError(f"{self.path}: the tensor {name} {problem}")

    @bits.unseen
    def tensor(self, digest: str, verify: bool = True) -> torch.Tensor | None:
        """The tensor of a digest, a copy of its own; None when the golden holds its row digests alone.

        ``verify`` hashes it again. GoldenError when it does not match or when the golden knows no such tensor.
        """
        entry = self._entry(digest)
        if not entry["stored"]:
            return None
        found, file = self._load(digest)
        if verify and bits.digest(found) != digest:
            raise GoldenError(f"{file}: the tensor {digest} does not match its digest: the file has changed")
        return found

    @bits.unseen
    def row_digests(self, digest: str) -> torch.Tensor:
        """Row digests of a tensor, uint8 [rows, 8], as ``bits.row_digests`` gives them."""
        entry = self._entry(digest)
        found, file = self._load(digest + ROWS)
        rows = bits.rows_of(tuple(entry["shape"]))[0]
        if found.dtype != torch.uint8 or found.shape != (rows, bits.ROW_DIGEST_BYTES):
            raise GoldenError(f"{file}: {digest}{ROWS} is not uint8 [{rows}, {bits.ROW_DIGEST_BYTES}]")
        return found

    def _entry(self, digest: str) -> dict[str, Any]:
        entry = self.manifest.tensors.get(digest)
        if entry is None:
            raise GoldenError(f"{self.path}: has no tensor {digest}")
        return entry

    def _load(self, name: str) -> tuple[torch.Tensor, Path]:
        reader, file = self._readers[name]
        # A clone: what lies in the mapped file is at any address, and kernels are chosen by alignment as well.
        return reader.get_tensor(name).clone(), file


def load_manifest(path: Path) -> Any:
    file = path / NAME
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "is not a golden: it has no manifest.json" if path.exists() else "does not exist"
        raise GoldenError(f"{path}: {what}{folder.hint(path)}") from error
    except OSError as error:
        raise InfrastructureError(f"{file}: {error.strerror}") from error
    try:
        return json.loads(text)
    except ValueError as error:  # undecodable bytes too
        raise GoldenError(f"{file}: not JSON, truncated or damaged: {error}") from error


def check_file(file: Path, entry: dict[str, Any]) -> None:
    try:
        size = file.stat().st_size
        if size != entry["size"]:
            raise GoldenError(f"{file}: {size} bytes, the manifest says {entry['size']}: truncated or edited")
        with file.open("rb") as data:
            found = _sha256(data)
    except FileNotFoundError as error:
        raise GoldenError(f"{file}: missing; the manifest names it") from error
    except OSError as error:
        raise InfrastructureError(f"{file}: {error.strerror}") from error
    if found != entry["sha256"]:
        raise GoldenError(f"{file}: its SHA-256 is not the manifest's: it was edited or damaged")


def _sha256(data: Any) -> str:
    whole = hashlib.sha256()
    while chunk := data.read(1 << 20):
        whole.update(chunk)
    return whole.hexdigest()
