"""Two evaluations of lm-evaluation-harness sample by sample, from the files that ``--output_path --log_samples`` writes.

The harness writes floats in full (``repr``), so that text decides about bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detinfer import fingerprint
from detinfer.errors import EXIT_DIVERGED, EXIT_SAME, EXIT_VACUOUS, GoldenError
from detinfer.fingerprint import Fingerprint

DATE = re.compile(r"_(\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl?$")
"""The part of a file's name that the files of one run share."""

INPUTS = {"doc_hash": "document", "prompt_hash": "prompt", "target_hash": "target", "arguments": "requests"}
OUTPUTS = {"resps": "answers", "filtered_resps": "filtered answers"}
MOST_LINES = 50

Key = tuple[str, str, str]
"""Task, document, filter."""


@dataclass(frozen=True)
class Run:
    """One evaluation: its samples, and the fingerprint where its model was wrapped."""

    path: Path
    samples: dict[Key, dict[str, Any]]
    fingerprint: Fingerprint | None

    @classmethod
    def read(cls, path: Path) -> Run:
        """From a results file, a samples file, or a folder (the newest results in it). GoldenError where there is none."""
        if path.is_dir():
            found = sorted(path.rglob("results_*.json"), key=lambda file: (file.name, str(file)))
            if not found:
                raise GoldenError(f"{path}: there is no results_*.json in it: run lm_eval with --output_path")
            path = found[-1]
        if path.suffix == ".jsonl":
            return cls(path, _samples([path]), None)
        date = DATE.search(path.name)
        beside = sorted(path.parent.glob(f"samples_*_{date[1]}.jsonl")) if date else []
        if not beside:
            raise GoldenError(f"{path}: no samples beside it: run lm_eval with --log_samples")
        held = fingerprint.find(_json(path))
        return cls(path, _samples(beside), fingerprint.from_json(held, str(path)) if held else None)


@dataclass
class Comparison:
    """What differs between two runs, sample by sample."""

    a: Run
    b: Run
    compared: int = 0
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where an answer or an input differs or a sample is missing, 5 where there is no sample."""
        if self.outputs or self.inputs or self.missing:
            return EXIT_DIVERGED
        return EXIT_SAME if self.compared else EXIT_VACUOUS

    def lines(self) -> Iterator[str]:
        """For a terminal: the first differences of each kind, and the counts."""
        for name, run in (("a", self.a), ("b", self.b)):
            yield f"{name}  {run.fingerprint or 'no fingerprint'}  {run.path}"
        if self.a.fingerprint and self.b.fingerprint and self.a.fingerprint != self.b.fingerprint:
            count = len(fingerprint.differences(self.a.fingerprint, self.b.fingerprint))
            yield f"fingerprints differ in {count} fields: detinfer fingerprint explain {self.a.path} {self.b.path}"
        for found in (self.missing, self.inputs, self.outputs):
            yield from found[:MOST_LINES]
            if len(found) > MOST_LINES:
                yield f"and {len(found) - MOST_LINES} more"
        yield (
            f"{self.compared} samples compared: {len(self.outputs)} answered differently, {len(self.inputs)} asked "
            f"differently, {len(self.missing)} in one run only"
        )


def compare(a: Run, b: Run) -> Comparison:
    """Every sample of both runs; answers to different questions are not held against each other."""
    found = Comparison(a, b)
    for key in sorted(a.samples.keys() | b.samples.keys(), key=_order):
        task, document, filter_ = key
        name = f"task {task}, document {document}" + (f", filter {filter_}" if filter_ != "none" else "")
        if key not in a.samples or key not in b.samples:
            found.missing.append(f"missing   {name}: only in {'a' if key in a.samples else 'b'}")
            continue
        left, right = a.samples[key], b.samples[key]
        found.compared += 1
        if asked := [said for field_, said in INPUTS.items() if left.get(field_) != right.get(field_)]:
            found.inputs.append(f"inputs    {name}: another {', another '.join(asked)}")
            continue
        for field_, said in OUTPUTS.items():
            one, other = _items(left.get(field_)), _items(right.get(field_))
            places = [i for i in range(max(len(one), len(other))) if one[i : i + 1] != other[i : i + 1]]
            if places:
                values = [(run[places[0]] if places[0] < len(run) else "none") for run in (one, other)]
                found.outputs.append(
                    f"diverged  {name}: {said} {', '.join(map(str, places))}; the first is {values[0]} in a, {values[1]} in b"
                )
                break
    return found


def _items(value: Any) -> list[str]:
    """The answers of a sample, each as its JSON text."""
    return [json.dumps(item) for item in value] if isinstance(value, list) else [json.dumps(value)]


def _order(key: Key) -> tuple[str, int, str, str]:
    return key[0], int(key[1]) if key[1].isdigit() else 0, key[1], key[2]


def _samples(files: list[Path]) -> dict[Key, dict[str, Any]]:
    found: dict[Key, dict[str, Any]] = {}
    for file in files:
        date = DATE.search(file.name)
        task = file.name[: date.start()].removeprefix("samples_") if date else file.stem
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line:
                continue
            try:
                held = json.loads(line)
                found[task, str(held["doc_id"]), str(held["filter"])] = held
            except (ValueError, KeyError, TypeError) as error:
                raise GoldenError(f"{file}:{number}: not a sample of lm-evaluation-harness: {error!r}") from error
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GoldenError(f"{path}: not JSON: {error}") from error
