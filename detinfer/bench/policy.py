"""What a policy costs per call: one operation on one element, with torch alone, overridden, and traced.

``python -m detinfer.bench.policy`` prints the table. Times are CPU time of this thread, the least of many repeats, so
that a busy machine adds little; run it with ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from detinfer.policy import deterministic

CALLS, REPEATS = 2000, 60


@dataclass(frozen=True)
class Cost:
    """Microseconds of one call: torch's own, under ``trust`` (overrides alone), under ``refuse`` (traced as well)."""

    name: str
    torch: float
    trust: float
    refuse: float


def run() -> Iterator[Cost]:
    """Each kind of operation in turn."""
    x = torch.ones(1, 1, 1)
    cases: dict[str, Callable[[], Any]] = {
        "torch.rsqrt(x)": lambda: torch.rsqrt(x),
        "torch.mean(x, -1)": lambda: torch.mean(x, -1),
        "torch.add(x, x)": lambda: torch.add(x, x),
        "x.view(1)": lambda: x.view(1),
    }
    with torch.no_grad():
        for name, once in cases.items():
            alone = least(once)
            with deterministic("batch", uncovered="trust"):
                trust = least(once)
            with deterministic("batch"):
                refuse = least(once)
            yield Cost(name, alone, trust, refuse)


def entering(calls: int = 50, repeats: int = 20) -> tuple[float, float]:
    """Microseconds of entering and leaving a block: the outermost one, and one inside another."""

    def block() -> None:
        with deterministic("batch", uncovered="trust"):
            pass

    outermost = least(block, calls, repeats)
    with deterministic("batch", uncovered="trust"):
        return outermost, least(block, calls, repeats)


def least(once: Callable[[], Any], calls: int = CALLS, repeats: int = REPEATS) -> float:
    """Microseconds of one call, the least of ``repeats`` means over ``calls``."""
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(calls):
            once()
        found.append((time.thread_time() - start) / calls)
    return min(found) * 1e6


def main() -> None:
    """Print the table."""
    print("| float32 [1, 1, 1], microseconds | torch | `trust` | `refuse` |\n|---|---|---|---|")
    for cost in run():
        print(f"| `{cost.name}` | {cost.torch:.1f} | {cost.trust:.1f} | {cost.refuse:.1f} |")
    outermost, inner = entering()
    print(f"\nEntering and leaving: {outermost:.0f} microseconds for the outermost block, {inner:.0f} inside another.")


if __name__ == "__main__":
    main()
