"""Which path runs for which size: a table for speed, written by ``detinfer bench collectives --tune`` on a machine.

Every path gives the same bits, so a table may say anything; all ranks must have the same one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from detinfer.errors import UsageError

_KNOWN = {
    "all_reduce": ("push", "push_tiles", "pull", "two_shot"),
    "reduce_scatter": ("push", "two_shot"),
    "all_gather": ("push", "push_tiles"),
    "all_reduce_rms_norm": ("push", "push_tiles", "pull", "two_shot"),
}
"""The paths of each collective; the last of each takes any size."""


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


def make(table: Mapping[str, Mapping[str, object]]) -> Paths:
    """Paths of ``{"all_reduce": {"up_to": [[65536, "push"]], "above": "two_shot"}, ...}``."""
    steps = []
    for name, known in _KNOWN.items():
        try:
            entry = table[name]
            pairs = tuple((int(most), str(path)) for most, path in entry["up_to"])  # type: ignore[attr-defined]
            last = str(entry["above"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"table of paths: {name} needs up_to, a list of [bytes, path], and above, a path ({error!r})"
            ) from None
        wrong = [path for path in (*(path for _, path in pairs), last) if path not in known]
        if wrong or last == "push":
            raise UsageError(f"table of paths: {name} has {', '.join(known)}, and push takes no size above all others")
        steps.append((name, tuple(sorted(pairs)), last))
    return Paths(tuple(steps))


def read(path: Path) -> Paths:
    """Paths of a JSON file; UsageError names what is wrong with it."""
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UsageError(f"table of paths {path}: {error}") from None


def default_paths(ranks: int) -> Paths:
    """What ships: for two ranks measured on two H200, for more a guess that nothing has measured."""
    kib, mib = 1 << 10, 1 << 20
    if ranks == 2:
        push = 512 * kib
        all_reduce = {"up_to": [[push, "push"], [4 * mib, "push_tiles"], [64 * mib, "two_shot"]], "above": "push_tiles"}
        norm = {"up_to": [[push, "push"], [2 * mib, "push_tiles"], [64 * mib, "two_shot"]], "above": "push_tiles"}
    else:
        push, middle = (128 * kib, 512 * kib) if ranks <= 4 else (64 * kib, 128 * kib)
        all_reduce = norm = {"up_to": [[push, "push"], [middle, "push_tiles"]], "above": "two_shot"}
    return make(
        {
            "all_reduce": all_reduce,
            "all_reduce_rms_norm": norm,
            "reduce_scatter": {"up_to": [[push, "push"]], "above": "two_shot"},
            "all_gather": {"up_to": [[push, "push"]], "above": "push_tiles"},
        }
    )
