"""The plan of the trials."""

from __future__ import annotations

from detinfer.goldens.runner import Request
from detinfer.goldens.sweep import EDGES, LARGEST, plan

REQUESTS = [Request(tokens=(1, 2, 3), steps=4) for _ in range(3)] + [Request(tokens=(1, 2), steps=4)]


def test_fifty_trials_hold_every_edge_and_a_mean_of_sixteen() -> None:
    """Powers of two and their neighbours from 1 to 64 are all tried, and batches are large on average."""
    sizes = [len(trial.batch) for trial in plan(REQUESTS, 50, seed=0)]
    assert set(EDGES) <= set(sizes)
    assert max(sizes) <= LARGEST
    assert min(sizes) == 1
    assert sum(sizes) / len(sizes) >= 16


def test_a_trial_depends_on_the_seed_and_its_number_alone() -> None:
    """Trial 7 of 8 is trial 7 of 50: one trial can be redone by itself."""
    assert plan(REQUESTS, 50, seed=3)[7] == plan(REQUESTS, 8, seed=3)[7]
    assert plan(REQUESTS, 50, seed=3) != plan(REQUESTS, 50, seed=4)


def test_rows_of_one_length_stand_together() -> None:
    """Prompts of three tokens never meet the prompt of two: nothing is padded."""
    for trial in plan(REQUESTS, 40, seed=1):
        assert len({len(REQUESTS[index].tokens) for index in trial.batch}) == 1


def test_every_decode_step_is_replayed() -> None:
    """Prefill in every trial, and each decode step in turn."""
    steps = {step for trial in plan(REQUESTS, 12, seed=0) for step in trial.steps}
    assert steps == {0, 1, 2, 3}
