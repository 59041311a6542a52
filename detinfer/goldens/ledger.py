"""What the tasks of a verification found, task by task: on rank 0 what every rank found, so that it can be saved.

A task counts as done once all ranks have finished it. Rank 0 then holds what each found: a rank that dies takes nothing
with it but the task that was under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from detinfer.errors import GoldenError
from detinfer.goldens.tasks import Done, Part, Task, check_again, part_from_json, part_to_json
from detinfer.models.ranks import Held, Ranks


class Ledger:
    """``done``: what this rank found. ``saved``: an interrupted run's, as JSON values, which is gone on with.

    GoldenError where ``saved`` cannot be read or was of another number of ranks.
    """

    def __init__(self, ranks: Ranks, saved: dict[str, Any] | None = None) -> None:
        self.done: Done = {}
        self._ranks = ranks
        self._rows: dict[str, list[Part]] = {}  # on rank 0 of several: what every rank found, by rank
        self._sums: dict[str, Held] = {}
        self._before: list[Done] = [{} for _ in range(ranks.size)]
        if saved is not None:
            self._before, self._sums = _columns(saved, ranks.size), _sums(saved)

    def begin(self) -> None:
        """Before some tasks: what ranks have shared until now belongs to none of them."""
        self._ranks.settle()

    def put(self, key: str, part: Part) -> None:
        """A task is done here; all ranks call it together, and it is done once all have."""
        ranks, before = self._ranks, replace(self._ranks.held)
        ranks.settle()
        after = ranks.held
        self._sums[key] = Held(
            after.tensors - before.tensors, after.differing - before.differing, "" if before.first else after.first
        )
        if ranks.size > 1:
            everyone = ranks.share(part, first=True)
            if ranks.rank == 0:
                self._rows[key] = everyone
        self.done[key] = part  # whole or not at all, wherever an interruption comes

    def skip(self, key: str) -> None:
        """A task that was done before the run was resumed: what ranks had compared in it counts in its place."""
        if self._ranks.size > 1:
            held, then = self._ranks.held, self._sums[key]
            held.tensors += then.tensors
            held.differing += then.differing
            held.first = held.first or then.first

    def take_up(self) -> None:
        """Add what was done before; GoldenError, on all ranks, where a task that was run again counts otherwise."""
        own, problem = self._before[self._ranks.rank], ""
        try:
            for key in self.done.keys() & own.keys():
                check_again(key, own[key], self.done[key])
        except GoldenError as error:
            problem = str(error)
        told = self._ranks.share(problem)
        for rank, said in enumerate(told):
            if said:
                raise GoldenError(f"rank {rank}: {said}" if len(told) > 1 else said)
        self.done.update(own)

    def to_json(self) -> dict[str, Any]:
        """``done`` of rank 0, ``others`` by rank from 1 on, and ``sums``: what ranks had compared in each task."""
        parts = [{key: part_to_json(part) for key, part in column.items()} for column in self._all()]
        keys = parts[0].keys() if len(parts) > 1 else ()
        return {"done": parts[0], "others": parts[1:], "sums": {key: asdict(self._sums[key]) for key in keys}}

    def counts(self) -> tuple[int, int, int]:
        """(tasks, rows compared, rows that differ) of all ranks so far, without the control's."""
        columns = self._all()
        judged = [part for column in columns for key, part in column.items() if not key.startswith("control/")]
        tasks = sum(not key.startswith("control/") for key in columns[0])
        return tasks, sum(part.rows_compared for part in judged), sum(part.rows_differing for part in judged)

    def _all(self) -> list[Done]:
        if self._ranks.size == 1:
            return [{**self._before[0], **self.done}]
        rows = dict(self._rows)
        return [{**before, **{key: row[rank] for key, row in rows.items()}} for rank, before in enumerate(self._before)]


def run_here(
    of: Sequence[Task],
    run: Callable[[Task], Part],
    ledger: Ledger,
    fail_fast: bool,
    ranks: Ranks,
    progress: Callable[[int], None],
) -> None:
    """Run the tasks that are not done one after another; on several ranks all run the same ones."""
    ledger.begin()
    for number, task in enumerate(of):
        progress(number)
        if task.key in ledger.done:
            ledger.skip(task.key)
        else:
            ledger.put(task.key, run(task))
        if fail_fast and ranks.any(ledger.done[task.key].rows_differing > 0):
            return


def _columns(saved: dict[str, Any], size: int) -> list[Done]:
    """By rank, the tasks that every rank had finished."""
    held = saved["unfinished"]
    found = [held["done"], *held.get("others", [])]
    if len(found) != size:
        raise GoldenError(f"--resume: the run was on {_ranks(len(found))}, this one is on {_ranks(size)}")
    keys = [key for key in found[0] if all(key in column for column in found)]
    return [{key: part_from_json(column[key]) for key in keys} for column in found]


def _sums(saved: dict[str, Any]) -> dict[str, Held]:
    held = saved["unfinished"]
    try:
        return {key: Held(**held["sums"][key]) for key in held["done"]} if held.get("others") else {}
    except (KeyError, TypeError) as error:
        raise GoldenError(f"a saved result does not say what ranks compared: {error!r}") from error


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"
