"""The control: the same trials and axes with the policy off. What diverges is reported, never judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from detinfer.goldens.axes import Axis, Walk
from detinfer.goldens.result import Control
from detinfer.goldens.sweep import Sweep, Trial
from detinfer.models.ranks import Ranks


def run_control(
    sweep: Sweep,
    trials: Sequence[Trial],
    axes: Sequence[Axis],
    cases: Sequence[int],
    seed: int,
    progress: Callable[[str, int, int], None],
    ranks: Ranks,
) -> Control:
    """Run these trials, and these cases of every axis, with no policy in force."""
    with torch.no_grad():
        for _ in sweep.alone():
            pass
        sweep.expect(trials)
        for done, trial in enumerate(trials):
            progress("control", done, len(trials))
            sweep.trial(trial)
            ranks.settle()
        walk = Walk(sweep.target, sweep.requests, sweep.results)
        for axis in walk.able([axis.name for axis in axes]):
            for number in cases:
                walk.case(axis, number, seed)
                ranks.settle()
    found, walked = sweep.found, list(walk.results.values())
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
