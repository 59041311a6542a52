"""Collectives between processes of this machine against gloo's, both sides in turn in one run.

A call's time is what passes between its return and the return of the call before, on the rank where that is longest:
what a program that calls one after the other waits for. Before a size is timed, the bytes of every rank and path are
compared with the reference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from detinfer.errors import Diverged, InfrastructureError

SIZES = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 24)
RANKS = (2, 4)
DTYPES = ("float32", "bfloat16", "float16")
ROUNDS = 4
PATTERN = 4096
"""Elements of the checked tensor until they repeat: the reference is slow."""

Call = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Timing:
    """all_reduce in place of ``bytes`` on each of ``ranks`` ranks: percentiles of a call's time, in seconds."""

    ranks: int
    bytes: int
    dtype: str
    detinfer: dict[str, float]
    gloo: dict[str, float]

    @property
    def ratio(self) -> float:
        """gloo's median over detinfer's."""
        return self.gloo["p50"] / self.detinfer["p50"]

    def to_json(self) -> dict[str, Any]:
        """The percentiles in microseconds and bandwidths in GB/s: the tensor's bytes over the median."""
        sides = {}
        for name, side in (("detinfer", self.detinfer), ("gloo", self.gloo)):
            sides[name] = {f"{key}_us": round(value * 1e6, 2) for key, value in side.items() if key != "calls"}
            sides[name] |= {"calls": side["calls"], "gb_per_s": round(self.bytes / side["p50"] / 1e9, 3)}
        return {"ranks": self.ranks, "bytes": self.bytes, "dtype": self.dtype, **sides, "ratio": round(self.ratio, 2)}


def run(
    ranks: Sequence[int] = RANKS, sizes: Sequence[int] = SIZES, dtypes: Sequence[str] = DTYPES[:1], seconds: float = 0.5
) -> Iterator[Timing]:
    """Start processes for each number of ranks, check and time every size and dtype in them.

    ``seconds`` is about what each side of one timing takes. Raises Diverged where bytes differ from the reference, and
    InfrastructureError where a process fails.
    """
    for count in ranks:
        with tempfile.TemporaryDirectory() as folder:
            task = {"store": f"{folder}/store", "size": count, "bytes": sizes, "dtypes": dtypes, "seconds": seconds}
            yield from _started(count, task)


def _started(count: int, task: dict[str, Any]) -> Iterator[Timing]:
    command = [sys.executable, "-m", "detinfer.bench.collectives"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    try:
        for rank in range(count):
            own = [*command, json.dumps({**task, "rank": rank})]
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen(own, stdout=out, env=environment, text=True))
        lines = processes[0].stdout
        assert lines is not None
        for line in lines:
            found = json.loads(line)
            if "diverged" in found:
                raise Diverged(found["diverged"])
            yield Timing(**found)
        codes = [process.wait(60) for process in processes]
        if any(codes):
            raise InfrastructureError(f"bench collectives: processes of {count} ranks ended with the statuses {codes}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def table(timings: Sequence[Timing]) -> Table:
    """The timings as a table for a terminal."""
    shown = Table(title="all_reduce in place: microseconds per call (p50 / p90 / p99), bytes over p50")
    for heading in ("ranks", "bytes", "dtype", "detinfer", "GB/s", "gloo", "GB/s", "gloo / detinfer"):
        shown.add_column(heading, justify="left" if heading == "dtype" else "right", no_wrap=True)
    for t in timings:
        cells = []
        for side in (t.detinfer, t.gloo):
            cells.append(" / ".join(f"{side[key] * 1e6:.1f}" for key in ("p50", "p90", "p99")))
            cells.append(f"{t.bytes / side['p50'] / 1e9:.2f}")
        shown.add_row(str(t.ranks), str(t.bytes), t.dtype, *cells, f"{t.ratio:.1f}")
    return shown


# ------------------------------------------------------------------------------------------------ in the processes


def _rank(task: dict[str, Any]) -> None:
    import torch.distributed as dist

    from detinfer.collectives import connect

    torch.set_num_threads(1)
    rank, size = task["rank"], task["size"]
    dist.init_process_group("gloo", init_method=f"file://{task['store']}", rank=rank, world_size=size)
    with connect(timeout=120.0) as ranks, torch.inference_mode():
        for name in task["dtypes"]:
            for nbytes in task["bytes"]:
                dtype: torch.dtype = getattr(torch, name)
                wrong = _check(ranks, nbytes // dtype.itemsize, name)
                if any(ranks.all_gather(torch.tensor([wrong])).tolist()):
                    if rank == 0:
                        print(
                            json.dumps({"diverged": f"all_reduce of {nbytes} bytes, {name}, {size} ranks"}), flush=True
                        )
                    return
                x = torch.zeros(nbytes // dtype.itemsize, dtype=dtype)
                sides: list[Call] = [lambda t: ranks.all_reduce(t, out=t), dist.all_reduce]
                found = _time(ranks, sides, x, task["seconds"])
                if rank == 0:
                    both = {"detinfer": found[0], "gloo": found[1]}
                    print(json.dumps({"ranks": size, "bytes": nbytes, "dtype": name, **both}), flush=True)
    dist.destroy_process_group()


def _check(ranks: Any, n: int, name: Any) -> bool:
    """Whether any path has other bytes than the reference on this rank."""
    from detinfer.collectives import PATHS
    from detinfer.collectives.stress import cancelling
    from detinfer.reference.all_reduce import all_reduce

    dtype: torch.dtype = getattr(torch, name)
    parts = cancelling(ranks.size, min(n, PATTERN), name)
    own = torch.from_numpy(np.resize(parts[ranks.rank], n).view(np.uint8)).view(dtype)
    expected = np.resize(all_reduce(parts, name), n)
    found = [ranks.all_reduce(own, path=path).view(torch.uint8).numpy() for path in (None, *PATHS["all_reduce"])]
    return any(bytes_.tobytes() != expected.tobytes() for bytes_ in found)


def _time(ranks: Any, sides: Sequence[Call], x: torch.Tensor, seconds: float) -> list[dict[str, float]]:
    counts = []
    for call in sides:
        start = time.perf_counter()
        for _ in range(3):
            call(x)
        mine = torch.tensor([(time.perf_counter() - start) / 3])
        slowest = float(ranks.all_reduce(mine, op="max"))
        counts.append(max(5, min(2000, int(seconds / ROUNDS / slowest))))
    spans: list[list[torch.Tensor]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for side, call in enumerate(sides):
            ranks.barrier()
            call(x)
            ends = [time.perf_counter()]
            for _ in range(counts[side]):
                call(x)
                ends.append(time.perf_counter())
            own = torch.tensor(ends, dtype=torch.float64).diff()
            spans[side].append(ranks.all_reduce(own, op="max"))
    found = []
    for taken in spans:
        ordered = torch.cat(taken).sort().values
        picks = {f"p{q}": float(ordered[min(len(ordered) * q // 100, len(ordered) - 1)]) for q in (50, 90, 99)}
        found.append({**picks, "calls": float(len(ordered))})
    return found


def to_json(timings: Sequence[Timing]) -> dict[str, Any]:
    """The timings and the machine they were taken on."""
    from detinfer import environment, native

    return {"environment": environment.capture(native.isa()).to_json(), "all_reduce": [t.to_json() for t in timings]}


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
