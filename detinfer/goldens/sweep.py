"""The trials: recorded rows at random positions among other recorded rows, compared with the same rows run alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from detinfer import bits
from detinfer.goldens.batch import Dimensions, join
from detinfer.goldens.collect import WHOLE, phase
from detinfer.goldens.compare import Difference, Rows, compare, rows_of
from detinfer.goldens.replay import Replay
from detinfer.goldens.result import Divergence, Tally
from detinfer.goldens.runner import Request, run
from detinfer.goldens.tree import Node, tensors

EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64)
"""Batch sizes where kernels are known to change: powers of two and their neighbours."""
LARGEST = 64
OTHERS = 4
"""Sizes between the edges, up to the middle ones, that each round of trials adds."""
KEPT = 100
"""Divergences kept with all details; the rest is counted."""

Key = tuple[int, int]
"""(request, step)"""


@dataclass(frozen=True)
class Trial:
    """One batch: which request stands in each row, and at which steps units are replayed on their own."""

    number: int
    batch: tuple[int, ...]
    steps: tuple[int, ...]


def plan(requests: Sequence[Request], n_trials: int, seed: int, sizes: Sequence[int] | None = None) -> list[Trial]:
    """The trials of a seed. A trial depends on the seed and its number alone, so that one can be redone by itself."""
    groups: dict[Any, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.company(), []).append(index)
    parts = list(groups.values())
    trials = []
    for number in range(n_trials):
        rng = random.Random(f"{seed}/{number}")
        members = parts[number % len(parts)]
        size = _size(number, seed) if sizes is None else sizes[number % len(sizes)]
        batch = tuple(rng.choice(members) for _ in range(size))
        last = requests[members[0]].steps - 1
        decode = (1 + number % last,) if last else ()
        # Prefill costs as much as all decode steps together: every second trial replays the units there too.
        trials.append(Trial(number, batch, decode if decode and number % 2 else (0, *decode)))
    return trials


def _size(number: int, seed: int) -> int:
    # Every round holds all the edges and a few others, shuffled: short sweeps see edges as well.
    turn, place = divmod(number, len(EDGES) + OTHERS)
    rng = random.Random(f"{seed}/sizes/{turn}")
    others = [size for size in range(1, LARGEST // 2) if size not in EDGES]
    round_ = [*EDGES, *rng.sample(others, OTHERS)]
    rng.shuffle(round_)
    return round_[place]


@dataclass
class Swept:
    """What a trial, or the whole of a sweep, counted and found."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    divergences: list[Divergence] = field(default_factory=list)
    diverged_trials: set[int] = field(default_factory=set)
    batches: int = 0
    batch_rows: int = 0

    @property
    def rows_compared(self) -> int:
        return sum(tally.rows_compared for tally in self.tallies.values())

    @property
    def rows_differing(self) -> int:
        return sum(tally.rows_differing for tally in self.tallies.values())

    @property
    def rows_possible(self) -> int:
        return sum(tally.rows_possible for tally in self.tallies.values())

    def add(self, part: Swept) -> None:
        """Count a trial in. Trials added in the order of their numbers give the same sweep wherever they were run."""
        for name, tally in part.tallies.items():
            whole = self.tallies.setdefault(name, Tally(tally.name, tally.kind, tally.type))
            whole.rows_compared += tally.rows_compared
            whole.rows_differing += tally.rows_differing
            whole.batches += tally.batches
            for ours, theirs in ((whole.ulps, tally.ulps), (whole.trials, tally.trials)):
                for what, count in theirs.items():
                    ours[what] = ours.get(what, 0) + count
        self.divergences += part.divergences[: KEPT - len(self.divergences)]
        self.diverged_trials |= part.diverged_trials
        self.batches += part.batches
        self.batch_rows += part.batch_rows


class Sweep:
    """Replays units and the whole model in batches; ``alone`` must have been run before, under the same policy."""

    def __init__(
        self,
        target: Any,
        requests: Sequence[Request],
        units: Sequence[Replay],
        whole: dict[str, Dimensions] | None,
        command: Callable[[str, int], str] = lambda unit, trial: "",
    ) -> None:
        self.target, self.requests, self._units = target, requests, units
        self.whole, self._whole, self._command = whole is not None, whole, command
        self.results: dict[Key, Node] = {}
        """What the whole model gave for each request alone; filled by ``alone``."""
        self.found = Swept({unit.name: Tally(unit.name, unit.kind, unit.type) for unit in units})
        if whole is not None:
            self.found.tallies[WHOLE] = Tally(WHOLE, "model", type(target.module).__name__)

    def alone(self) -> Iterator[tuple[Replay | None, Key, Node]]:
        """Run every unit's recorded calls and every request alone, and keep what they give."""
        for unit in self._units:
            for key in unit.arguments:
                unit.alone[key] = unit.run([key])
                yield unit, key, unit.alone[key]
        if self._whole is not None:
            for index, request in enumerate(self.requests):
                for step, node in enumerate(run(self.target, [request])):
                    self.results[index, step] = node
                    yield None, (index, step), node

    def digest(self) -> str:
        """SHA-256 over what the whole model gave alone, or where it is left out every unit: tells two runs apart."""
        nodes = [node for _, node in sorted(self.results.items())]
        if self._whole is None:
            nodes = [unit.alone[key] for unit in self._units for key in sorted(unit.alone)]
        whole = hashlib.sha256()
        for node in nodes:
            for path, tensor in tensors(node):
                whole.update(f"{path} {bits.digest(tensor)}\n".encode())
        return whole.hexdigest()

    def expect(self, trials: Sequence[Trial]) -> None:
        """Count the rows that these trials can compare, so that what was left out shows."""
        for trial in trials:
            for unit in self._units:
                for keys in self._parts(unit, trial):
                    dimensions = unit.outputs_batch[phase(keys[0][1])]
                    nodes = [unit.alone[key] for key in keys]
                    self.found.tallies[unit.name].rows_possible += _possible(nodes, dimensions)
            if self._whole is not None:
                for step in range(self.requests[trial.batch[0]].steps):
                    nodes = [self.results[index, step] for index in trial.batch]
                    self.found.tallies[WHOLE].rows_possible += _possible(nodes, self._whole[phase(step)])

    def _parts(self, unit: Replay, trial: Trial) -> Iterator[list[Key]]:
        for step in trial.steps:
            keys = [(index, step) for index in trial.batch]
            if all(key in unit.alone for key in keys):  # else a layer that these requests do not pass through
                yield from unit.companies(keys)

    def trial(self, trial: Trial) -> Swept:
        """Run one trial; what it found is not counted in ``found`` until it is added there."""
        part = Swept()
        for unit in self._units:
            for keys in self._parts(unit, trial):
                self._judge(part, trial, unit, keys, unit.run(keys), unit.expected(keys), unit.outputs_batch)
        if self._whole is not None:
            results = run(self.target, [self.requests[index] for index in trial.batch])
            for step, got in enumerate(results):
                keys = [(index, step) for index in trial.batch]
                expected = join([self.results[key] for key in keys], self._whole[phase(step)])
                self._judge(part, trial, None, keys, got, expected, self._whole)
        if part.rows_differing:
            part.diverged_trials.add(trial.number)
        return part

    def passes(self, trial: Trial) -> None:
        """Run what a trial runs and compare nothing: what a verification costs is held against it (``bench.verify``)."""
        for unit in self._units:
            for keys in self._parts(unit, trial):
                unit.run(keys)
        if self._whole is not None:
            run(self.target, [self.requests[index] for index in trial.batch])

    def _judge(
        self,
        part: Swept,
        trial: Trial,
        unit: Replay | None,
        keys: Sequence[Key],
        got: Node,
        expected: Node,
        dimensions: dict[str, Dimensions],
    ) -> None:
        step = keys[0][1]
        name = WHOLE if unit is None else unit.name
        if name not in part.tallies:
            kind, type_name = ("model", type(self.target.module).__name__) if unit is None else (unit.kind, unit.type)
            part.tallies[name] = Tally(name, kind, type_name)
        tally = part.tallies[name]
        rows = compare(got, expected, dimensions[phase(step)], len(keys))
        tally.rows_compared += rows.compared
        tally.rows_differing += rows.differing
        tally.batches += 1
        for distance, count in rows.ulps.items():
            tally.ulps[distance] = tally.ulps.get(distance, 0) + count
        if rows.differing:
            tally.trials[str(trial.number)] = tally.trials.get(str(trial.number), 0) + rows.differing
        part.batches += 1
        part.batch_rows += len(keys)
        if rows.first is not None and len(part.divergences) < KEPT:
            found = divergence(tally, step, keys, rows, rows.first)
            found = replace(found, trial=trial.number, batch=len(keys), command=self._command(tally.name, trial.number))
            part.divergences.append(found)


def _possible(nodes: Sequence[Node], dimensions: Dimensions) -> int:
    shared = sum(rows_of(t) for path, t in tensors(nodes[0]) if dimensions[path] is None)
    return shared + sum(rows_of(t) for node in nodes for path, t in tensors(node) if dimensions[path] is not None)


def divergence(tally: Tally, step: int, keys: Sequence[Key], rows: Rows, first: Difference) -> Divergence:
    """The record of one comparison whose rows differ."""
    position = first.batch_row if first.batch_row is not None else 0
    return Divergence(
        unit=tally.name or "the whole model",
        kind=tally.kind,
        type=tally.type,
        phase=phase(step),
        step=step,
        request=keys[position][0],
        path=first.path,
        row=first.row,
        element=first.element,
        got=first.got,
        expected=first.expected,
        ulp=first.ulp,
        rows_differing=rows.differing,
        rows_compared=rows.compared,
        position=position,
        note=first.note,
    )
