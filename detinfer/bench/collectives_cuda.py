"""Collectives between the GPUs of this host against NCCL's and torch's symmetric memory, all sides in one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from detinfer.bench import cuda_timing
from detinfer.bench.collectives_check import cancelling, check_sum
from detinfer.collectives.cuda import CudaCommunicator, connect
from detinfer.errors import UsageError

SIZES = tuple(1 << power for power in range(11, 29))
FUSED = (
    *((t, 2880) for t in (1, 4, 16, 64)),
    *((t, 4096) for t in (1, 16, 64)),
    *((t, 8192) for t in (1, 2, 4, 8, 16, 64)),
)
EAGER = ((1, 4096), (2048, 2880), (2048, 8192), (8192, 8192), (16384, 8192))
MOST_ELEMENTS = 1 << 27
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One collective by one side: microseconds a call; ``host`` where calls were single, not replayed."""

    collective: str
    size: str
    bytes: int
    side: str
    p50: float
    p90: float
    p99: float
    host: float | None = None


def _replayed(call: Call, nbytes: int) -> cuda_timing.Times:
    calls = 20 if nbytes < 1 << 24 else 5
    return cuda_timing.replayed(
        call, calls, 1000 // calls if nbytes < 1 << 26 else 40, 200 // calls if nbytes < 1 << 26 else 8
    )


def _symmetric(x: torch.Tensor) -> tuple[torch.Tensor, str]:
    import torch.distributed._symmetric_memory as symmetric

    group = dist.group.WORLD
    assert group is not None
    room = symmetric.empty(SIZES[-1] // 2, dtype=x.dtype, device=x.device)
    symmetric.rendezvous(room, group.group_name)
    room.copy_(x[: len(room)])
    return room, group.group_name


def _windows(x: torch.Tensor) -> torch.Tensor | None:
    """Memory that NCCL has registered as a symmetric window; None where this torch or NCCL cannot."""
    try:
        group: Any = dist.group.WORLD
        backend = group._get_backend(torch.device("cuda"))
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            room = torch.zeros(SIZES[-1] // 2, dtype=x.dtype, device=x.device)
        backend.register_mem_pool(pool, symm=True)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return room


def _sizes(comm: CudaCommunicator, x: torch.Tensor, y: torch.Tensor, add: Callable[..., None]) -> None:
    room, name = _symmetric(x)
    window = _windows(x)
    one, two = torch.ops.symm_mem.one_shot_all_reduce, torch.ops.symm_mem.two_shot_all_reduce_
    for nbytes in SIZES:
        n = nbytes // 2
        given, out, shared = x[:n], y[:n], room[:n]
        if nbytes <= 1 << 26:
            check_sum(comm, given, out)
        sides: dict[str, Call] = {
            "detinfer": lambda given=given, out=out: comm.all_reduce(given, out=out),  # type: ignore[misc]
            "detinfer again": lambda given=given, out=out: comm.all_reduce(given, out=out),  # type: ignore[misc]
            "nccl": lambda out=out: dist.all_reduce(out),  # type: ignore[misc]
            "symm_mem two-shot": lambda s=shared: two(s, "sum", name),  # type: ignore[misc]
        }
        if nbytes <= 1 << 24:
            sides["symm_mem one-shot"] = lambda s=shared: one(s, "sum", name)  # type: ignore[misc]
        if window is not None:
            sides["nccl, windows"] = lambda w=window[:n]: dist.all_reduce(w)  # type: ignore[misc]
        if n % comm.size == 0:
            part = torch.empty(n // comm.size, dtype=x.dtype, device="cuda")

            def both(given: torch.Tensor = given, part: torch.Tensor = part, out: torch.Tensor = out) -> None:
                dist.reduce_scatter_tensor(part, given)
                dist.all_gather_into_tensor(out, part)

            sides["nccl rs + ag"] = both
        for side, call in sides.items():
            add("all_reduce", f"{nbytes >> 10} KiB", nbytes, side, call)
    for nbytes in SIZES[:-1]:
        n = nbytes // 2
        whole, small, out = x[: n * comm.size], x[:n], y[: n * comm.size]
        size = f"{nbytes >> 10} KiB"
        add("reduce_scatter", size, nbytes, "detinfer", lambda w=whole, o=y[:n]: comm.reduce_scatter(w, out=o))
        add("reduce_scatter", size, nbytes, "nccl", lambda w=whole, o=y[:n]: dist.reduce_scatter_tensor(o, w))
        add("all_gather", size, nbytes, "detinfer", lambda s=small, o=out: comm.all_gather(s, out=o))
        add("all_gather", size, nbytes, "nccl", lambda s=small, o=out: dist.all_gather_into_tensor(o, s))


def _fused(comm: CudaCommunicator, x: torch.Tensor, y: torch.Tensor, tokens: int, hidden: int) -> dict[str, Call]:
    given, out = x[: tokens * hidden].view(tokens, hidden), y[: tokens * hidden].view(tokens, hidden)
    residual, total = torch.zeros_like(given), torch.empty_like(given)
    weight = torch.ones(hidden, dtype=x.dtype, device="cuda")

    def separate() -> None:
        dist.all_reduce(out)
        torch.add(out, residual, out=total)
        torch.nn.functional.rms_norm(total, (hidden,), weight, 1e-6)

    return {
        "all_reduce alone": lambda: comm.all_reduce(given, out=out),
        "detinfer": lambda: comm.all_reduce_rms_norm(given, residual, weight, 1e-6, out=out, residual_out=total),
        "nccl, add, rms_norm": separate,
    }


def work(say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Every timing, as rank 0 sees it; runs on all ranks."""
    found: list[dict[str, Any]] = []

    def add(collective: str, size: str, nbytes: int, side: str, call: Call) -> None:
        times = _replayed(call, nbytes)
        found.append(asdict(Timing(collective, size, nbytes, side, times.p50, times.p90, times.p99)))
        say(f"{collective} {size} {side}: {times.p50:.2f}")

    speed = cuda_timing.copy_bandwidth()
    found.append(asdict(Timing("copy", "GB/s each way", 0, "copy", speed, speed, speed)))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = cancelling(max(MOST_ELEMENTS, SIZES[-2] // 2 * ranks), rank, ranks)
    y = torch.empty_like(x)
    with connect(timeout=20.0) as comm:
        _sizes(comm, x, y, add)
        for tokens, hidden in FUSED:
            for side, call in _fused(comm, x, y, tokens, hidden).items():
                add("all_reduce + rms_norm", f"{tokens} x {hidden}", tokens * hidden * 2, side, call)
        for tokens, hidden in EAGER:
            for side, call in _fused(comm, x, y, tokens, hidden).items():
                times, host = cuda_timing.eager(call, 200, 50)
                line = Timing(
                    "eager", f"{tokens} x {hidden}", tokens * hidden * 2, side, times.p50, times.p90, times.p99, host
                )
                found.append(asdict(line))
        torch.cuda.synchronize()
        comm.check()
    return found


def run(ranks: int) -> list[Timing]:
    """Start ``ranks`` processes, one GPU each, and time everything. Raises Diverged where a byte is wrong."""
    if torch.cuda.device_count() < ranks or ranks < 2:
        raise UsageError(
            f"bench collectives-cuda: {ranks} ranks need as many GPUs, 2 or more; here are {torch.cuda.device_count()}"
        )
    return [Timing(**line) for line in cuda_timing.run(ranks, work)]


def tables(timings: list[Timing]) -> list[Table]:
    """One table a collective: a row a size, a column a side, p50 and behind it p90 and p99 of detinfer's."""
    shown = []
    for collective in dict.fromkeys(timing.collective for timing in timings if timing.collective != "copy"):
        chosen = [timing for timing in timings if timing.collective == collective]
        sides = list(dict.fromkeys(timing.side for timing in chosen))
        table = Table(title=f"{collective}: microseconds a call, p50 (detinfer: p50 / p90 / p99)")
        table.add_column("size")
        for side in sides:
            table.add_column(side, justify="right")
        for size in dict.fromkeys(timing.size for timing in chosen):
            row = {timing.side: timing for timing in chosen if timing.size == size}
            cells = []
            for side in sides:
                timing = row.get(side)
                if timing is None:
                    cells.append("")
                    continue
                cell = f"{timing.p50:.2f}"
                if side == "detinfer":
                    cell += f" / {timing.p90:.2f} / {timing.p99:.2f}"
                cells.append(cell if timing.host is None else f"{cell}, host {timing.host:.1f}")
            table.add_row(size, *cells)
        shown.append(table)
    return shown


def write(timings: list[Timing], path: Path) -> None:
    """The timings as JSON, one object each."""
    path.write_text(json.dumps([asdict(timing) for timing in timings], indent=1) + "\n", encoding="utf-8")
