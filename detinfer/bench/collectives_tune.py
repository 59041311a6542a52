"""The fastest path of each collective at each size between this machine's GPUs: a table for ``connect`` to read.

Every path is timed at every size that it takes, with tiles and numbers of blocks of several kinds; the communicator's
geometry is the one whose best paths are the fastest on the whole, and the table has its fastest path for each size.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table

from detinfer.bench import cuda_timing
from detinfer.bench.collectives_check import cancelling, check_sum
from detinfer.collectives.cuda import CudaCommunicator, connect
from detinfer.collectives.cuda_native import Geometry
from detinfer.collectives.cuda_paths import KNOWN, Tuned, make, shipped
from detinfer.errors import InfrastructureError, NativeError, UsageError

SIZES = tuple(1 << power for power in range(11, 29))
HIDDEN = 4096
"""Elements of a row where the norm is timed."""
TILES_FROM = 1 << 15
"""Bytes below which only push is timed: tiles meet more often."""
CHECKED = 1 << 26
NEAR = 1.01
"""A path stays the choice of the next size while it is within this of the fastest there."""

Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Line:
    """Microseconds a call of a collective by a path of a geometry."""

    collective: str
    bytes: int
    geometry: str
    path: str
    us: float


def geometries(ranks: int) -> dict[str, Geometry]:
    """What is tried: the shipped geometry, and others that differ in the tiles' number and size."""
    base = shipped(ranks).geometry
    found = {"shipped": base}
    for blocks in (66, 132, 264) if ranks <= 4 else (66, 132):
        found[f"{blocks} blocks"] = replace(base, tile_channels=blocks)
    for part in (32768, 65536, 131072):
        found[f"tiles of {part >> 10} KiB"] = replace(base, part_bytes=part)
    return {name: each for name, each in found.items() if name == "shipped" or each != base}


def choose(lines: Iterable[Line], names: Iterable[str]) -> str:
    """The geometry whose fastest paths are the fastest: the least geometric mean over collectives and sizes.

    push is the same in all of them and is timed once.
    """
    best: dict[tuple[str, int], dict[str, float]] = {}
    for line in lines:
        for name in names if line.path == "push" else [line.geometry]:
            row = best.setdefault((line.collective, line.bytes), {})
            row[name] = min(row.get(name, math.inf), line.us)
    totals = {name: sum(math.log(row.get(name, math.inf)) for row in best.values()) for name in names}
    return min(totals, key=lambda name: totals[name])


def table_of(lines: Iterable[Line]) -> dict[str, dict[str, Any]]:
    """``up_to`` and ``above`` of each collective from times of one geometry: a path goes up to the last size it wins."""
    times: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines:
        times.setdefault(line.collective, {}).setdefault(line.bytes, {})[line.path] = line.us
    found: dict[str, dict[str, Any]] = {}
    for name, sizes in times.items():
        steps: list[list[Any]] = []
        for nbytes, row in sorted(sizes.items()):
            fastest = min(row, key=lambda path: row[path])
            if steps and row.get(steps[-1][1], math.inf) <= NEAR * row[fastest]:
                fastest = steps[-1][1]
            if steps and steps[-1][1] == fastest:
                steps[-1][0] = nbytes
            else:
                steps.append([nbytes, fastest])
        last = next((path for _, path in reversed(steps) if path != "push"), KNOWN[name][-1])
        found[name] = {"up_to": steps[:-1] if steps[-1][1] == last else steps, "above": last}
    return found


def work(say: Callable[[str], None] = lambda text: None) -> tuple[Tuned, list[Line]]:
    """Time everything and choose, in every rank; rank 0's is the result."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    most = SIZES[-1] // 2
    x = cancelling(most, rank, ranks)
    whole = x.repeat(-(-SIZES[-2] // 2 * ranks // most))  # of reduce_scatter and all_gather
    buffers = x, torch.empty_like(x), whole
    lines: list[Line] = []
    tried = {}
    for name, geometry in geometries(ranks).items():
        try:
            comm = connect(geometry=geometry, paths=shipped(ranks).paths, timeout=20.0)
        except (NativeError, InfrastructureError) as error:
            say(f"{name}: left out ({error})")
            continue
        tried[name] = geometry
        with comm:
            lines += [
                Line(collective, nbytes, name, path, round(us, 3))
                for collective, nbytes, path, us in _times(comm, buffers, name == "shipped")
            ]
        say(f"{name}: timed")
    name = choose(lines, tried)
    kept = [line for line in lines if line.path == "push" or line.geometry == name]
    return Tuned(name, tried[name], make(table_of(kept))), lines


def _times(comm: CudaCommunicator, buffers: Buffers, push: bool) -> Iterable[tuple[str, int, str, float]]:
    x, y, _ = buffers
    for collective, paths in KNOWN.items():
        for nbytes in SIZES if collective.startswith("all_reduce") else SIZES[:-1]:
            call = _call(comm, collective, nbytes, buffers)
            if call is None:
                continue
            for path in paths:
                if (path == "push" and not push) or (path != "push" and nbytes < TILES_FROM):
                    continue
                if path == "push" and not _pushed(comm, collective, nbytes):
                    continue
                if collective == "all_reduce" and nbytes <= CHECKED:
                    check_sum(comm, x[: nbytes // 2], y[: nbytes // 2], path)
                yield collective, nbytes, path, _timed(call, path, nbytes)


def _pushed(comm: CudaCommunicator, collective: str, nbytes: int) -> bool:
    channels, room = comm.push_room
    if collective == "all_reduce_rms_norm":
        return -(-(nbytes // (2 * HIDDEN)) // channels) * 2 * HIDDEN <= room
    return nbytes <= channels * room


def _call(comm: CudaCommunicator, collective: str, nbytes: int, buffers: Buffers) -> Callable[[str], Any] | None:
    x, y, whole = buffers
    n = nbytes // 2
    if collective == "all_reduce":
        return lambda path: comm.all_reduce(x[:n], path=path, out=y[:n])
    if collective == "reduce_scatter":
        return lambda path: comm.reduce_scatter(whole[: n * comm.size], path=path, out=y[:n])
    if collective == "all_gather":
        return lambda path: comm.all_gather(x[:n], path=path, out=whole[: n * comm.size])
    if n % HIDDEN:
        return None
    shape = (n // HIDDEN, HIDDEN)
    given, norm = x[:n].view(shape), y[:n].view(shape)
    residual, total = torch.ones_like(given), torch.empty_like(given)
    weight = torch.ones(HIDDEN, dtype=x.dtype, device="cuda")
    return lambda path: comm.all_reduce_rms_norm(given, residual, weight, 1e-6, path=path, out=norm, residual_out=total)


def _timed(call: Callable[[str], Any], path: str, nbytes: int) -> float:
    calls = 20 if nbytes < 1 << 23 else 4
    return cuda_timing.replayed(lambda: call(path), calls, 15, 3).p50


def run(ranks: int) -> tuple[Tuned, list[Line]]:
    """Start ``ranks`` processes, one GPU each, and tune in them."""
    if torch.cuda.device_count() < ranks or ranks < 2:
        raise UsageError(f"--tune: {ranks} ranks need as many GPUs, 2 or more; here are {torch.cuda.device_count()}")
    found: tuple[Tuned, list[Line]] = cuda_timing.run(ranks, work, print_line)
    return found


def print_line(text: str) -> None:
    """Say how far it is, once for all ranks."""
    import sys

    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def environment(ranks: int) -> dict[str, object]:
    """What a table was made on: ``gpu`` and ``ranks`` decide whether it is read, the rest is to be looked at."""
    import detinfer

    return {
        "gpu": torch.cuda.get_device_name(0),
        "ranks": ranks,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "detinfer": detinfer.__version__,
        "date": datetime.date.today().isoformat(),
    }


def measured(tuned: Tuned, lines: Iterable[Line]) -> list[dict[str, Any]]:
    """The times that a table follows from, one object each."""
    return [asdict(line) for line in lines if line.path == "push" or line.geometry == tuned.origin]


def tables(tuned: Tuned, lines: Iterable[Line]) -> list[Table]:
    """One table a collective: a row a size, a column a path, at the chosen geometry."""
    shown = []
    kept = [line for line in lines if line.path == "push" or line.geometry == tuned.origin]
    for name, known in KNOWN.items():
        table = Table(title=f"{name}, {tuned.origin}: microseconds a call")
        table.add_column("bytes", justify="right")
        for path in (*known, "chosen"):
            table.add_column(path, justify="right")
        times: dict[int, dict[str, float]] = {}
        for line in kept:
            if line.collective == name:
                times.setdefault(line.bytes, {})[line.path] = line.us
        for nbytes, row in times.items():
            cells = [f"{row[path]:.2f}" if path in row else "" for path in known]
            table.add_row(str(nbytes), *cells, tuned.paths.of(name, nbytes))
        shown.append(table)
    return shown
