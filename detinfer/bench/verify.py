"""What ``detinfer verify`` costs beside the model's own forward passes, and the host memory it takes.

    python -m detinfer.bench.verify GOLDEN [--trials 10] [--device cuda]

Each trial is run as it is and with its comparisons left out: the same calls of the same layers and of the whole model on the
same batches. The two are timed in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from detinfer.errors import DetinferError
from detinfer.goldens.format import Golden
from detinfer.goldens.inputs import Options, check_target, chosen_units, load_inputs, requests_of
from detinfer.goldens.prepare import policy_of, prepare_again
from detinfer.goldens.tasks import sweep_of
from detinfer.models import targets
from detinfer.models.ranks import ALONE
from detinfer.policy import deterministic


@dataclass(frozen=True)
class Cost:
    """Seconds of the trials and of the forward passes in them, rows compared, and the process's peak memory in bytes."""

    trials: int
    rows: int
    seconds: float
    passes: float
    cpu_seconds: float
    cpu_passes: float
    host: int
    gpu: int

    @property
    def ratio(self) -> float:
        """The trials' time over that of their forward passes."""
        return self.seconds / self.passes


def measure(
    path: Path, trials: int, device: str | None = None, said: Callable[[int, float, float], None] = lambda *_: None
) -> Cost:
    """Time the first trials of seed 0; ``said`` hears each with its two times."""
    golden = Golden.read(path)
    recorded, policy = golden.manifest, policy_of(golden)
    where = targets.checked(device or ("cuda" if recorded.environment.get("gpu") else "cpu"))
    dtype = getattr(torch, recorded.target["dtype"])
    target = targets.load(recorded.target["spec"], dtype, recorded.inputs["seed"], ALONE, where, policy.reductions)
    check_target(golden, target, policy)
    requests = requests_of(golden, target, prepare_again(target))
    options = Options(n_trials=max(trials, 20))
    units, chosen, whole = chosen_units(golden, target, policy, options, ALONE)

    def timed(work: Callable[[], object]) -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        work()
        if where.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu

    totals = [[0.0, 0.0], [0.0, 0.0]]
    with deterministic(replace(policy, uncovered="trust")):
        load_inputs(golden, target, requests, units, chosen, ALONE)
        sweep = sweep_of(golden, target, requests, units, whole, options)
        for _ in sweep.alone():
            pass
        gc.collect()
        for trial in options.trials(requests)[:trials]:
            ways: list[Callable[[], object]] = [
                lambda one=trial: sweep.found.add(sweep.trial(one)),  # type: ignore[misc]
                lambda one=trial: sweep.passes(one),  # type: ignore[misc]
            ]
            order = (0, 1) if trial.number % 2 else (1, 0)
            found = {way: timed(ways[way]) for way in order}
            for way, (wall, cpu) in found.items():
                totals[way][0] += wall
                totals[way][1] += cpu
            said(len(trial.batch), found[0][0], found[1][0])
    (seconds, cpu_seconds), (passes, cpu_passes) = totals
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu = torch.cuda.max_memory_allocated() if where.type == "cuda" else 0
    return Cost(trials, sweep.found.rows_compared, seconds, passes, cpu_seconds, cpu_passes, host, gpu)


def main() -> None:
    """Measure and print one golden."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--device")
    given = parser.parse_args()
    line = "batch {:3}: {:8.3f} s, its forward passes {:8.3f} s"
    try:
        cost = measure(given.golden, given.trials, given.device, lambda *found: print(line.format(*found), flush=True))
    except DetinferError as error:
        raise SystemExit(f"error: {error}") from None
    print(
        f"{cost.trials} trials, {cost.rows:,} rows: {cost.seconds:.2f} s, their forward passes {cost.passes:.2f} s: "
        f"{cost.ratio:.3f} ({cost.cpu_seconds / cost.cpu_passes:.3f} in CPU time); "
        f"host memory {cost.host / 1e9:.2f} GB" + (f", GPU {cost.gpu / 1e9:.2f} GB" if cost.gpu else "")
    )


if __name__ == "__main__":
    main()
