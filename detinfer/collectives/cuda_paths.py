"""Which path runs for which size between GPUs: a table for speed, which ``detinfer bench collectives-cuda --tune`` writes.

Every path gives the same bits, so a table may say anything; all ranks must have the same one. The first that is there is
taken: the file named by ``$DETINFER_CUDA_PATHS``, the user's for this GPU and number of ranks (``user_file``), the one
that ships (``cuda_paths.json``).
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from detinfer.collectives.cuda_native import PATHS, Geometry
from detinfer.errors import UsageError

VARIABLE = "DETINFER_CUDA_PATHS"
"""Path of a table to use in place of the user's and of the one that ships."""

FORMAT = "detinfer collective paths 1"

KNOWN = {
    "all_reduce": ("push", "push_tiles", "pull", "two_shot"),
    "reduce_scatter": ("push", "two_shot"),
    "all_gather": ("push", "push_tiles"),
    "all_reduce_rms_norm": ("push", "push_tiles", "pull", "two_shot"),
}
"""The paths of each collective; all but push take any size, and may say how they are cut (``cut``)."""


def cut(where: str, path: str) -> tuple[str, int, int]:
    """(path, blocks at most, bytes of a rank in a tile at most) of ``path`` or ``path@blocksxbytes``; 0: all there are."""
    found = re.fullmatch(r"(push)|(push_tiles|pull|two_shot)(?:@([1-9]\d{0,3})x([1-9]\d{2,6}))?", path)
    if found is None:
        raise UsageError(
            f"{where}: path {path!r} is one of {', '.join(PATHS)}; all but push may end in @BLOCKSxBYTES, as two_shot@66x8192"
        )
    return found[1] or found[2], int(found[3] or 0), int(found[4] or 0)


@dataclass(frozen=True)
class Paths:
    """For each collective, (bytes up to which, path) ascending, and the path above the last.

    Bytes are those of an all_reduce's tensor, of a reduce_scatter's result and of an all_gather's input.
    """

    steps: tuple[tuple[str, tuple[tuple[int, str], ...], str], ...]

    def of(self, collective: str, nbytes: int) -> str:
        """The path for ``nbytes``."""
        for name, steps, last in self.steps:
            if name == collective:
                for most, path in steps:
                    if nbytes <= most:
                        return path
                return last
        raise UsageError(f"no paths are given for {collective}")

    def within(self, geometry: Geometry) -> Paths:
        """The same, with push no further than a communicator of ``geometry`` holds."""
        most = geometry.push_channels * geometry.push_bytes
        return Paths(
            tuple(
                (name, tuple((min(up_to, most) if path == "push" else up_to, path) for up_to, path in steps), last)
                for name, steps, last in self.steps
            )
        )


@dataclass(frozen=True)
class Tuned:
    """Paths and geometry for a number of ranks, and where they are from."""

    origin: str
    geometry: Geometry
    paths: Paths


def make(table: Mapping[str, Mapping[str, object]]) -> Paths:
    """Paths of ``{"all_reduce": {"up_to": [[65536, "push"]], "above": "two_shot"}, ...}``."""
    steps = []
    for name, known in KNOWN.items():
        try:
            entry = table[name]
            pairs = tuple((int(most), str(path)) for most, path in entry["up_to"])  # type: ignore[attr-defined]
            last = str(entry["above"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"table of paths: {name} needs up_to, a list of [bytes, path], and above, a path ({error!r})"
            ) from None
        wrong = [path for path in (*(path for _, path in pairs), last) if cut(name, path)[0] not in known]
        if wrong or last == "push":
            raise UsageError(f"table of paths: {name} has {', '.join(known)}, and push takes no size above all others")
        steps.append((name, tuple(sorted(pairs)), last))
    return Paths(tuple(steps))


def _tuned(entry: Mapping[str, Any], origin: str) -> Tuned:
    known = {field.name: field.type for field in fields(Geometry)}
    given = entry.get("geometry", {})
    if not isinstance(given, dict) or not isinstance(entry.get("paths"), dict):
        raise UsageError("table of paths: geometry and paths have to be objects")
    for name, value in given.items():
        if name not in known or isinstance(value, bool) != (known[name] == "bool") or not isinstance(value, int):
            raise UsageError(f"table of paths: geometry has {name!r}: {value!r}; it has {', '.join(known)}")
    return Tuned(origin, Geometry(**given), make(entry["paths"]))


def read(path: Path, gpu: str, ranks: int) -> Tuned:
    """The table in a file; UsageError names what is wrong with it, another GPU or number of ranks included."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UsageError(f"it is no table of paths: its format is not {FORMAT!r}")
        made = content.get("environment", {})
        if (made.get("gpu"), made.get("ranks")) != (gpu, ranks):
            raise UsageError(
                f"it was made for {made.get('ranks')} x {made.get('gpu')}, here are {ranks} x {gpu}: make one with "
                f"detinfer bench collectives-cuda --tune --ranks {ranks}"
            )
        return _tuned(content, str(path))
    except (OSError, ValueError, AttributeError, UsageError) as error:
        raise UsageError(f"table of paths {path}: {error}; remove the file to use what ships") from None


def write(path: Path, environment: Mapping[str, object], tuned: Tuned, measured: object = None) -> None:
    """A table for ``read``; ``environment`` has ``gpu`` and ``ranks``, ``measured`` is kept beside it to be looked at."""
    paths = {name: {"up_to": [list(step) for step in steps], "above": last} for name, steps, last in tuned.paths.steps}
    content = {"format": FORMAT, "environment": environment, "geometry": asdict(tuned.geometry), "paths": paths}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content if measured is None else {**content, "measured": measured}, indent=1)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)  # a rank that reads at this moment sees the old table or the new one


def user_file(gpu: str, ranks: int) -> Path:
    """Where the user's table for a GPU and a number of ranks lies: in ``$XDG_CONFIG_HOME/detinfer``, else ~/.config."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "detinfer" / "paths"
    return folder / f"{re.sub('[^A-Za-z0-9]+', '-', gpu).strip('-').lower()}-{ranks}.json"


def chosen(gpu: str, ranks: int) -> Tuned:
    """The table for ``ranks`` GPUs of this name. Raises UsageError for a file that is there and cannot be used."""
    if named := os.environ.get(VARIABLE):
        return read(Path(named), gpu, ranks)
    mine = user_file(gpu, ranks)
    return read(mine, gpu, ranks) if mine.exists() else shipped(ranks)


@functools.cache
def shipped(ranks: int) -> Tuned:
    """The table that ships for a number of ranks; ``origin`` says whether it was measured."""
    entry = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))[str(ranks)]
    return _tuned(entry, f"what ships, {entry['from']}")
