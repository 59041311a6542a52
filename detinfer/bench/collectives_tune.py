"""The fastest path of each collective at each size between this machine's GPUs: a table for ``connect`` to read.

Every path is timed at every size that it takes, tiles by several numbers of blocks and sizes of tiles; the table has the
fastest for each size, and the communicator's geometry is made as large as these need.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table

from detinfer.bench import cuda_timing
from detinfer.bench.collectives_check import cancelling, check_sum
from detinfer.collectives.cuda import CudaCommunicator, connect
from detinfer.collectives.cuda_native import Geometry
from detinfer.collectives.cuda_paths import KNOWN, Tuned, cut, make, shipped
from detinfer.errors import UsageError

SIZES = tuple(1 << power for power in range(11, 29))
HIDDEN = 4096
"""Elements of a row where the norm is timed."""
TILES_FROM = 1 << 15
"""Bytes below which only push is timed: tiles meet more often."""
TILE_BYTES = (8192, 16384, 32768)
BLOCKS = (66, 132, 264)
CHECKED = 1 << 26
NEAR = 1.01
"""A path stays the choice of the next size while it is within this of the fastest there."""
LOST, LOST_FROM = 1.5, 1 << 23
"""A path that takes this many times as long as the fastest, at so many bytes or more, is not timed at larger sizes: there
bandwidth decides and no longer how often the ranks meet."""

Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Line:
    """Microseconds a call of a collective by a path, cut as it says."""

    collective: str
    bytes: int
    path: str
    us: float


def largest(ranks: int) -> Geometry:
    """The geometry to time in: with it every cut that is tried has room."""
    blocks = BLOCKS[-1] if ranks <= 4 else BLOCKS[-2]  # with more ranks a thread holds more: one block a processor
    return replace(
        shipped(ranks).geometry, tile_channels=blocks, tile_bytes=TILE_BYTES[-1], part_bytes=TILE_BYTES[-1] * ranks
    )


def cuts(path: str, collective: str, nbytes: int, geometry: Geometry, ranks: int) -> list[str]:
    """``path`` in every way to cut ``nbytes`` that csrc would cut differently (``run_tiles`` and ``run_parts``)."""
    if path == "push":
        return [path]
    shared = ranks if path == "two_shot" and collective != "reduce_scatter" else 1
    least = geometry.least_tile_bytes // (ranks if path == "two_shot" else 1) // 16 * 16
    found: dict[tuple[int, int], str] = {}
    for blocks in (count for count in BLOCKS if count <= geometry.tile_channels):
        for most in TILE_BYTES:
            own = -(-nbytes // (shared * blocks))
            tile = max(least, min(-(-own // 512) * 512, most))
            used = min(-(-nbytes // (shared * tile)), blocks)
            found.setdefault((tile, used), f"{path}@{blocks}x{most}")
    return list(found.values())


def table_of(lines: Iterable[Line]) -> dict[str, dict[str, Any]]:
    """``up_to`` and ``above`` of each collective: a path goes up to the last size that it wins."""
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


def needed(geometry: Geometry, table: dict[str, dict[str, Any]], ranks: int) -> Geometry:
    """``geometry`` with as many channels and as large tiles as the table's paths use: they are the memory it takes."""
    chosen = [
        cut(name, path) for name, entry in table.items() for path in [*(p for _, p in entry["up_to"]), entry["above"]]
    ]
    blocks = max((blocks for _, blocks, _ in chosen), default=0)
    parts = max((most for path, _, most in chosen if path == "two_shot"), default=0)
    tiles = max((most for path, _, most in chosen if path in ("push_tiles", "pull")), default=0)
    return replace(
        geometry,
        tile_channels=blocks or geometry.tile_channels,
        tile_bytes=max(tiles, geometry.least_tile_bytes),
        part_bytes=max(parts * ranks, geometry.least_tile_bytes),
    )


def work(say: Callable[[str], None] = lambda text: None) -> tuple[Tuned, list[Line]]:
    """Time everything and choose, in every rank; rank 0's is the result."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    most = SIZES[-1] // 2
    x = cancelling(most, rank, ranks)
    whole = x.repeat(-(-SIZES[-2] // 2 * ranks // most))  # of reduce_scatter and all_gather
    buffers = x, torch.empty_like(x), whole
    lines: list[Line] = []
    geometry = largest(ranks)
    with connect(geometry=geometry, paths=shipped(ranks).paths, timeout=20.0) as comm:
        for collective in KNOWN:
            lines += _times(comm, collective, geometry, buffers)
            say(f"{collective}: timed")
    table = table_of(lines)
    return Tuned("timed here", needed(geometry, table, ranks), make(table)), lines


def _times(comm: CudaCommunicator, collective: str, geometry: Geometry, buffers: Buffers) -> Iterator[Line]:
    lost: set[str] = set()
    for nbytes in SIZES if collective.startswith("all_reduce") else SIZES[:-1]:
        call = _call(comm, collective, nbytes, buffers)
        if call is None:
            continue
        row: dict[str, float] = {}
        for path in KNOWN[collective]:
            if path in lost or (path != "push" and nbytes < TILES_FROM):
                continue
            if path == "push" and not _pushed(comm, collective, nbytes):
                continue
            for each in cuts(path, collective, nbytes, geometry, comm.size):
                if collective == "all_reduce" and nbytes <= CHECKED:
                    check_sum(comm, buffers[0][: nbytes // 2], buffers[1][: nbytes // 2], each)
                us = _timed(call, each, nbytes)
                row[path] = min(us, row.get(path, math.inf))
                yield Line(collective, nbytes, each, round(us, 3))
        lost |= losers(nbytes, row)


def losers(nbytes: int, row: dict[str, float]) -> set[str]:
    """The paths of ``row`` that larger sizes need not be timed by."""
    return {path for path, us in row.items() if nbytes >= LOST_FROM and us > LOST * min(row.values())}


def _pushed(comm: CudaCommunicator, collective: str, nbytes: int) -> bool:
    channels, room = comm.push_room
    if collective == "all_reduce_rms_norm":
        return (
            -(-(nbytes // (2 * HIDDEN)) // min(channels, 128)) * 2 * HIDDEN <= room
        )  # no more blocks of long rows fit
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


def measured(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """The times that a table follows from, one object each."""
    return [asdict(line) for line in lines]


def tables(tuned: Tuned, lines: Iterable[Line]) -> list[Table]:
    """One table a collective: a row a size, a column a path with its fastest cut's time, and the one that is chosen."""
    times: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines:
        row = times.setdefault(line.collective, {}).setdefault(line.bytes, {})
        path = cut(line.collective, line.path)[0]
        row[path] = min(line.us, row.get(path, math.inf))
    shown = []
    for name, sizes in times.items():
        table = Table(title=f"{name}: microseconds a call")
        table.add_column("bytes", justify="right")
        for path in (*KNOWN[name], "chosen"):
            table.add_column(path, justify="right")
        for nbytes, row in sizes.items():
            cells = [f"{row[path]:.2f}" if path in row else "" for path in KNOWN[name]]
            table.add_row(str(nbytes), *cells, tuned.paths.of(name, nbytes))
        shown.append(table)
    return shown
