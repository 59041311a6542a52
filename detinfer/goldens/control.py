"""The control: the same trials and axes with the policy off. What diverges is reported, never judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from detinfer.goldens.axes import Axis, Walk
from detinfer.goldens.result import Control
from detinfer.goldens.sweep import Sweep, Trial
from detinfer.goldens.tasks import Done, Task, Tasks, tasks

Share = Callable[[Sequence[Task], Tasks], None]
"""Runs those of some tasks that are not done yet."""


def prepare(sweep: Sweep, trials: Sequence[Trial], axes: Sequence[Axis], seed: int) -> Tasks:
    """The tasks of a control, ready to run; call it with no policy in force and keep it so."""
    for _ in sweep.alone():
        pass
    walk = Walk(sweep.target, sweep.requests, sweep.results)
    able = walk.able([axis.name for axis in axes if axis.off])
    return Tasks(sweep, walk, {axis.name: axis for axis in able}, {trial.number: trial for trial in trials}, seed)


def run_control(
    sweep: Sweep,
    trials: Sequence[Trial],
    axes: Sequence[Axis],
    cases: Sequence[int],
    seed: int,
    done: Done,
    share: Share,
) -> Control:
    """Run these trials, and these cases of every axis, with no policy in force."""
    with torch.no_grad():
        held = prepare(sweep, trials, axes, seed)
        sweep.expect(trials)
        of = tasks(trials, list(held.axes), cases, control=True)
        share(of, held)
    held.count(of, done, fail_fast=False)
    found, walked = sweep.found, list(held.walk.results.values())
    differs = found.diverged_trials or any(axis.rows_differing for axis in walked)
    firsts = [*found.divergences, *(axis.first for axis in walked if axis.first is not None)]
    return Control(
        verdict="diverged" if differs else "same",
        trials=len(trials),
        trials_diverged=len(found.diverged_trials),
        rows_compared=found.rows_compared,
        rows_differing=found.rows_differing,
        units=list(found.tallies.values()),
        first=firsts[0] if firsts else None,
        axes=walked,
    )
