"""What an all_reduce of 64 KiB through torch.distributed costs: gloo alone, and under a policy.

``python -m detinfer.bench.distributed`` prints microseconds of wall time per call on rank 0, the least of five runs of 400
calls, for one rank and for two.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from detinfer.collectives import connect
from detinfer.policy import deterministic

ELEMENTS, CALLS, RUNS = 16384, 400, 5


def _least(call: Callable[[], Any]) -> float:
    for _ in range(CALLS // 2):
        call()
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


def _rank(rank: int, size: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    x = torch.zeros(ELEMENTS)

    def all_reduce() -> None:
        dist.all_reduce(x)

    found = {"gloo": _least(all_reduce)}
    with connect() as ranks:
        found["Communicator"] = _least(lambda: ranks.all_reduce(x, out=x))
    with deterministic("batch", uncovered="trust"):
        found["trust"] = _least(all_reduce)
    with deterministic("batch"):
        found["refuse"] = _least(all_reduce)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print one line for each number of ranks."""
    spawn = multiprocessing.get_context("spawn")
    for size in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            results = spawn.SimpleQueue()
            store = str(Path(folder) / "store")
            ranks = [spawn.Process(target=_rank, args=(rank, size, store, results)) for rank in range(size)]
            for process in ranks:
                process.start()
            found = results.get()
            for process in ranks:
                process.join()
        print(
            size, "rank " if size == 1 else "ranks", *(f"{name} {value:.1f}" for name, value in found.items()), sep="  "
        )


if __name__ == "__main__":
    main()
