"""A short form of kills.py, whose long form is run by hand."""

from __future__ import annotations

import kills


def test_ranks_killed_at_random_moments() -> None:
    """Twelve groups lose a rank while they connect or call: each survivor names it, and nothing is left behind."""
    where, problems = kills.kill_many(12, seed=7)
    assert problems == []
    assert sum(where.values()) == 12
    assert any("call" in stage for stage in where)
