"""What an all_reduce of 64 KiB through torch.distributed costs: the backend alone, and under a policy.

``python -m detinfer.bench.distributed`` prints microseconds of wall time per call on rank 0, the least of five runs of 400
calls, for one rank and for two over gloo. With ``--device cuda`` a rank a GPU over NCCL: the host's microseconds to start
a call, and in brackets those of a call until the last one is done.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
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


def _least(call: Callable[[], Any], finish: Callable[[], Any]) -> tuple[float, float]:
    """Microseconds of ``call``: until it returns, and until ``finish`` does after many of them."""
    for _ in range(CALLS // 2):
        call()
    started, done = [], []
    for _ in range(RUNS):
        finish()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        started.append(time.perf_counter() - start)
        finish()
        done.append(time.perf_counter() - start)
    return min(started) / CALLS * 1e6, min(done) / CALLS * 1e6


def _rank(rank: int, size: int, device: str, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    backend, finish = ("nccl", torch.cuda.synchronize) if device == "cuda" else ("gloo", lambda: None)
    if device == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    x = torch.zeros(ELEMENTS, device=here)

    def all_reduce() -> None:
        dist.all_reduce(x)

    found = {backend: _least(all_reduce, finish)}
    with connect(device=here) as ranks:
        found["Communicator"] = _least(lambda: ranks.all_reduce(x, out=x), finish)
    with deterministic("batch", uncovered="trust"):
        found["trust"] = _least(all_reduce, finish)
    with deterministic("batch"):
        found["refuse"] = _least(all_reduce, finish)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print one line for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    sizes = (1, 2) if device == "cpu" else (min(torch.cuda.device_count(), 8),)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast is off on both sides
    spawn = multiprocessing.get_context("spawn")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            results = spawn.SimpleQueue()
            store = str(Path(folder) / "store")
            ranks = [spawn.Process(target=_rank, args=(rank, size, device, store, results)) for rank in range(size)]
            for process in ranks:
                process.start()
            found = results.get()
            for process in ranks:
                process.join()
        shown = (
            f"{name} {started:.1f}" + (f" ({done:.1f})" if device == "cuda" else "")
            for name, (started, done) in found.items()
        )
        print(size, "rank " if size == 1 else "ranks", *shown, sep="  ")


if __name__ == "__main__":
    main()
