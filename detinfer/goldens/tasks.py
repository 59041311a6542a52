"""The trials of a sweep and the cases of its axes as tasks: run here or elsewhere, in any order, and counted in order.

What a task finds depends on the golden, the seed and the task's number alone. So a verification that was interrupted
goes on with the tasks that are left, several processes share them out, and the result is that of one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from detinfer.errors import GoldenError
from detinfer.goldens.axes import Axis, Walk
from detinfer.goldens.batch import Dimensions
from detinfer.goldens.collect import WHOLE
from detinfer.goldens.format import Golden
from detinfer.goldens.inputs import Options
from detinfer.goldens.replay import Replay
from detinfer.goldens.result import AxisResult, Divergence, Tally
from detinfer.goldens.runner import Request
from detinfer.goldens.sweep import Sweep, Swept, Trial

Part = Swept | AxisResult
"""What one task found: a trial's counts, or a case's."""

Done = dict[str, Part]
"""What was found so far, by the task's key."""


@dataclass(frozen=True)
class Task:
    """Trial ``number``, or that case of an ``axis``; ``control`` with the policy off."""

    number: int
    axis: str = ""
    control: bool = False

    @property
    def key(self) -> str:
        """Its name in a saved result: ``trial/7``, ``chunks/0``, ``control/trial/7``."""
        return f"{'control/' if self.control else ''}{self.axis or 'trial'}/{self.number}"


def tasks(trials: Sequence[Trial], axes: Sequence[str], cases: Sequence[int], control: bool = False) -> list[Task]:
    """The tasks of trials and of every axis's cases, in the order in which they count."""
    found = [Task(trial.number, control=control) for trial in trials]
    return found + [Task(number, axis, control) for number in cases for axis in axes]


@dataclass
class Tasks:
    """Runs tasks on one model: the references of ``sweep`` must be there, and the policy that is meant in force."""

    sweep: Sweep
    walk: Walk
    axes: dict[str, Axis]
    trials: dict[int, Trial]
    seed: int

    def run(self, task: Task) -> Part:
        """What one task finds."""
        if task.axis:
            return self.walk.part(self.axes[task.axis], task.number, self.seed)
        return self.sweep.trial(self.trials[task.number])

    def count(self, of: Iterable[Task], done: Done, fail_fast: bool) -> None:
        """Add what the tasks found to the sweep and the walk, in this order, as far as one run would have gone."""
        for task in of:
            part = done.get(task.key)
            if part is None:
                return
            if isinstance(part, AxisResult):
                self.walk.add(part)
            else:
                self.sweep.found.add(part)
            if fail_fast and part.rows_differing:
                return


def sweep_of(
    golden: Golden,
    target: Any,
    requests: Sequence[Request],
    units: Sequence[Replay],
    whole: dict[str, Dimensions] | None,
    options: Options,
) -> Sweep:
    """A sweep whose divergences say how to redo them."""
    return Sweep(target, requests, units, whole, lambda unit, trial: options.redo(str(golden.path), unit, trial))


def ready(golden: Golden, sweep: Sweep, options: Options) -> Tasks:
    """The tasks of a verification, once the references of ``sweep`` are there."""
    walk = Walk(
        sweep.target,
        sweep.requests,
        sweep.results,
        lambda axis, case: options.redo(str(golden.path), WHOLE, case, axis),
    )
    axes = {axis.name: axis for axis in walk.able(options.axes if sweep.whole else ())}
    trials = {trial.number: trial for trial in options.trials(sweep.requests)}
    return Tasks(sweep, walk, axes, trials, options.seed)


def check_again(key: str, before: Part, now: Part) -> None:
    """GoldenError unless a task that was run again counts what it counted before."""
    if _counts(before) != _counts(now):
        raise GoldenError(
            f"{key} finds {now.rows_differing} of {now.rows_compared} rows that differ, in the run that is resumed it "
            f"found {before.rows_differing} of {before.rows_compared}: the model does not repeat itself, or is another "
            f"one. Start again without --resume"
        )


def _counts(part: Part) -> Any:
    if isinstance(part, AxisResult):
        return part.comparisons, part.rows_compared, part.rows_differing
    return {name: (one.rows_compared, one.rows_differing, one.batches) for name, one in part.tallies.items()}


def part_to_json(part: Part) -> dict[str, Any]:
    """Plain JSON values, to be read back by ``part_from_json``."""
    if isinstance(part, AxisResult):
        return {"axis": asdict(part)}
    found = asdict(part)
    return {
        "trial": {**found, "tallies": list(found["tallies"].values()), "diverged_trials": sorted(part.diverged_trials)}
    }


def part_from_json(data: dict[str, Any]) -> Part:
    """The part that ``part_to_json`` wrote; GoldenError where it is none."""
    try:
        if "axis" in data:
            held = AxisResult(**data["axis"])
            return replace(held, first=None if held.first is None else divergence_from_json(held.first))
        held = data["trial"]
        return Swept(
            tallies={tally["name"]: Tally(**tally) for tally in held["tallies"]},
            divergences=[divergence_from_json(one) for one in held["divergences"]],
            diverged_trials=set(held["diverged_trials"]),
            batches=held["batches"],
            batch_rows=held["batch_rows"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise GoldenError(f"a saved result holds a part that cannot be read: {error!r}") from error


def divergence_from_json(data: Any) -> Divergence:
    """A divergence of a saved result."""
    return Divergence(**{**data, "row": tuple(data["row"])})
