"""Where a golden is stale: another environment, and an operation that was not portable when it was recorded or is not now."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from detinfer import environment, native
from detinfer.goldens.result import Comparison
from detinfer.goldens.verify import _staleness
from detinfer.policy import Policy

ON_A_GPU = {"name": "NVIDIA H200", "driver": "580.1"}


def judged(gpu: dict[str, str], then: bool, now: bool) -> Comparison:
    """The verdict on a CPU for a golden of ``gpu``; ``then`` and ``now``: whether its product was and is portable."""
    here = environment.capture(native.isa(), ())
    manifest: Any = SimpleNamespace(
        environment=replace(here, gpu=gpu).to_json(),
        decisions=[{"op": "aten::mm", "portable": then}, {"op": "aten::add.Tensor", "portable": True}],
        policy=Policy().to_json(),
    )
    target = SimpleNamespace(module=nn.Linear(2, 2), libraries=())
    return _staleness(Comparison(verdict="diverged"), manifest, target, [{"op": "aten::mm", "portable": now}], Policy())


@pytest.mark.parametrize(
    ("gpu", "then", "now", "verdict"),
    [
        (ON_A_GPU, False, True, "stale"),
        (ON_A_GPU, True, False, "stale"),
        (ON_A_GPU, True, True, "diverged"),
        ({}, False, False, "diverged"),
    ],
    ids=["not portable then", "not portable now", "portable: judged", "the same environment: judged"],
)
def test_a_golden_of_a_gpu_on_a_cpu(gpu: dict[str, str], then: bool, now: bool, verdict: str) -> None:
    found = judged(gpu, then, now)
    assert found.verdict == verdict
    assert [name for name, _, _ in found.stale] == [f"gpu.{name}" for name in sorted(gpu)]
    assert all("aten::mm" in reason and "aten::add" not in reason for reason in found.reasons)
    assert bool(found.reasons) == (verdict == "stale")
