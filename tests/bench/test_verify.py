"""The cost of a verification: the comparisons are left out of the forward passes and of nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from detinfer import cli
from detinfer.bench import verify
from detinfer.goldens import sweep


def test_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the trials is compared once, and the passes run the same number of layers without comparing one."""
    assert (
        cli.run(["record", "builtin:dense", "-o", str(tmp_path / "g"), "--n-prompts", "2", "--decode-steps", "2"]) == 0
    )
    calls: list[str] = []
    real = sweep.Replay.run
    monkeypatch.setattr(sweep.Replay, "run", lambda self, keys: calls.append(self.name) or real(self, keys))
    found = verify.measure(tmp_path / "g", 3, said=lambda *_: calls.append("trial"))
    assert (found.trials, found.rows > 1000, found.passes > 0, found.host > 1e6) == (3, True, True, True)
    ends = [place for place, name in enumerate(calls) if name == "trial"]
    for start, end in itertools.pairwise(ends):
        part = calls[start + 1 : end]
        assert part[: len(part) // 2] == part[len(part) // 2 :]
        assert len(part) > 10
