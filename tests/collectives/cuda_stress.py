"""Collectives in a tight loop with fresh inputs, compared byte by byte on the device: 13 shapes of a served model.

Also a program: ``python cuda_stress.py RANKS ITERATIONS`` runs every shape in RANKS processes, one GPU each, and prints
what differs. With a library that carries a fault (csrc built with DETINFER_MUTANT) it shows whether the fault is seen.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from detinfer.bench import cuda_timing
from detinfer.collectives import cuda_native
from detinfer.collectives.cuda import CudaCommunicator, connect
from detinfer.collectives.stress import cancelling
from detinfer.errors import DetinferError
from detinfer.reference.all_reduce import all_reduce
from detinfer.reference.all_reduce_rms_norm import all_reduce_rms_norm
from detinfer.reference.arithmetic import load, store

SHAPES = [(tokens, 4096) for tokens in (1, 16, 80, 81, 8192)] + [
    (tokens, 2880) for tokens in (64, 128, 208, 728, 1024, 1319, 2048, 16384)
]
ROWS = 64
"""Different rows of a width; an iteration takes as many as it needs, in an order of its own."""


def on_device(bits: Any) -> torch.Tensor:
    """bfloat16 bits on the current GPU."""
    return torch.from_numpy(bits.view(np.int16).copy()).cuda().view(torch.bfloat16)


class Table:
    """Rows of a width for every rank, and what the reference makes of them."""

    def __init__(self, ranks: int, rank: int, hidden: int) -> None:
        parts = [part.reshape(ROWS, hidden) for part in cancelling(ranks, ROWS * hidden, "bfloat16", hidden)]
        residual = cancelling(2, ROWS * hidden, "bfloat16", hidden + 1)[1].reshape(ROWS, hidden)
        weight = store((np.random.default_rng(3).integers(-99, 99, hidden) / 64).astype(np.float32), "bfloat16")
        norm, total = all_reduce_rms_norm(parts, residual, load(weight, "bfloat16"), 1e-6, "bfloat16")
        self.own, self.residual, self.weight = on_device(parts[rank]), on_device(residual), on_device(weight)
        self.sum = on_device(all_reduce(parts, "bfloat16"))
        self.norm, self.total = on_device(norm), on_device(total)


def different(found: torch.Tensor, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """How many elements have other bytes than the rows of the table."""
    return (found.view(torch.int16) != table[rows].view(torch.int16)).sum()


class Step:
    """One iteration on fixed tensors, so that it can be captured: all_reduce by a path, and the fused call."""

    def __init__(self, comm: CudaCommunicator, table: Table, tokens: int, path: str | None) -> None:
        self.comm, self.table, self.path = comm, table, path
        self.rows = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        shape = (tokens, table.own.shape[1])
        self.x, self.r, self.sum, self.norm, self.total = (
            torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(5)
        )
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def collectives(self) -> None:
        """What is tested."""
        torch.index_select(self.table.own, 0, self.rows, out=self.x)
        torch.index_select(self.table.residual, 0, self.rows, out=self.r)
        self.comm.all_reduce(self.x, path=self.path, out=self.sum)
        self.comm.all_reduce_rms_norm(
            self.x, self.r, self.table.weight, 1e-6, path=self.path, out=self.norm, residual_out=self.total
        )

    def compare(self) -> None:
        """Counts the elements that differ."""
        for found, expected in (
            (self.sum, self.table.sum),
            (self.norm, self.table.norm),
            (self.total, self.table.total),
        ):
            self.wrong += different(found, expected, self.rows)


def stress(comm: CudaCommunicator, tokens: int, table: Table, iterations: int, graph: bool, path: str | None) -> int:
    """Elements with wrong bytes in ``iterations`` of fresh inputs, the same on all ranks."""
    step = Step(comm, table, tokens, path)
    order = torch.Generator(device="cuda").manual_seed(tokens)
    rows = [torch.randint(ROWS, (tokens,), generator=order, device="cuda") for _ in range(8)]
    run = step.collectives
    run()
    step.compare()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step.collectives()
        run = captured.replay
    for turn in range(iterations):
        step.rows.copy_((rows[turn % 8] + turn) % ROWS)
        run()
        step.compare()
    torch.cuda.synchronize()
    comm.check()
    return int(step.wrong)


def paths_of(comm: CudaCommunicator, tokens: int, hidden: int) -> list[str | None]:
    """The default path and the others that take this size."""
    fits = tokens * hidden * 2 <= 1 << 20
    return [None, "push_tiles", "pull", "two_shot", *(["push"] if fits and tokens <= 128 else [])]


def work(iterations: int, every_path: bool, most: int = 1 << 30, timeout: float = 10.0) -> list[dict[str, Any]]:
    """All shapes of at most ``most`` tokens, eager and replayed; one line each."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shapes = [shape for shape in SHAPES if shape[0] <= most]
    tables = {hidden: Table(ranks, rank, hidden) for hidden in {hidden for _, hidden in shapes}}
    comm = connect(timeout=timeout)
    found = []
    for tokens, hidden in shapes:
        for path in paths_of(comm, tokens, hidden) if every_path else [None]:
            for graph in (False, True):
                line: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "path": path, "graph": graph}
                try:
                    line["wrong"] = stress(comm, tokens, tables[hidden], iterations, graph, path)
                except DetinferError as error:
                    return [*found, {**line, "error": str(error)}]
                worst = torch.tensor(line["wrong"], device="cuda")
                dist.all_reduce(worst, op=dist.ReduceOp.MAX)
                found.append({**line, "wrong": int(worst)})
    comm.close()
    return found


def main() -> None:
    """Print one JSON line for each shape, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", type=int)
    parser.add_argument("iterations", type=int)
    parser.add_argument(
        "paths", nargs="?", choices=("every path",), help="all that take a shape, not the default alone"
    )
    parser.add_argument("--most", type=int, default=1 << 30, metavar="TOKENS", help="shapes of at most so many")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="that a rank waits for another")
    given = parser.parse_args()
    ranks, iterations, limit = given.ranks, given.iterations, 30 * given.timeout
    lines = cuda_timing.run(ranks, work, iterations, bool(given.paths), given.most, given.timeout, limit_s=limit)
    bad = [line for line in lines if line.get("wrong") or "error" in line]
    for line in bad[:5]:
        print(json.dumps(line))
    print(
        f"mutant {cuda_native.mutant()}: {len(lines)} runs of {iterations} iterations on {ranks} GPUs, {len(bad)} with wrong bytes"
    )


if __name__ == "__main__":
    main()
