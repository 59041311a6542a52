"""Times of collectives between the GPUs of one host: a process for each, CUDA graphs and eager calls, percentiles."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from detinfer.errors import InfrastructureError


@dataclass(frozen=True)
class Times:
    """Microseconds a call: percentiles over groups of calls, the greater of all ranks."""

    p50: float
    p90: float
    p99: float


def percentiles(samples: Sequence[float]) -> Times:
    """Percentiles of this rank's samples, then the greatest over the ranks."""
    ordered = sorted(samples)
    own = [ordered[min(int(len(ordered) * q), len(ordered) - 1)] for q in (0.5, 0.9, 0.99)]
    worst = torch.tensor(own, dtype=torch.float64, device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return Times(*worst.tolist())


def replayed(call: Callable[[], Any], calls: int, replays: int, warm: int) -> Times:
    """``call`` captured ``calls`` times in a CUDA graph that is replayed ``replays`` times, after ``warm`` replays.

    A sample is a replay's time over ``calls``. Replays follow one another without a word to the host.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    with torch.cuda.stream(stream):
        return percentiles([t / calls for t in _between(graph.replay, replays, warm)])


def eager(call: Callable[[], Any], calls: int, warm: int) -> tuple[Times, float]:
    """Single calls: their times on the stream, and the host's microseconds a call."""
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(min(calls, 200)):
        call()
    host = (time.perf_counter() - start) / min(calls, 200) * 1e6
    torch.cuda.synchronize()
    dist.barrier()
    return percentiles(_between(call, calls, 0)), host


def _between(call: Callable[[], Any], count: int, warm: int) -> list[float]:
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) * 1e3 for before, after in itertools.pairwise(events)]


def copy_bandwidth(nbytes: int = 1 << 30) -> float:
    """GB/s each way when every GPU writes to the next one at the same time with a plain copy."""
    rank, size = dist.get_rank(), dist.get_world_size()
    here = torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{rank}")
    there = torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{(rank + 1) % size}")
    samples = _between(lambda: there.copy_(here), 10, 3)
    return nbytes / percentiles(samples).p50 / 1e3


def run(ranks: int, work: Callable[..., Any], *arguments: Any, limit_s: float = 560.0) -> Any:
    """``work(*arguments)`` in ``ranks`` processes, one GPU each, joined by NCCL; what rank 0 returned.

    Raises InfrastructureError with a rank's traceback where one fails.
    """
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(queue, f"file://{folder}/store", rank, ranks, work, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + limit_s
        answers: dict[int, Any] = {}
        try:
            while len(answers) < ranks:
                rank, good, value = queue.get(timeout=max(deadline - time.monotonic(), 1.0))
                if not good:
                    raise InfrastructureError(f"rank {rank} of {ranks} failed:\n{value}")
                answers[rank] = value
        except Exception as error:
            for process in processes:
                process.kill()
            if isinstance(error, InfrastructureError):
                raise
            raise InfrastructureError(f"ranks did not finish within {limit_s:g} s ({error!r})") from None
        finally:
            for process in processes:
                process.join(20)
    return answers[0]


def _rank(queue: Any, store: str, rank: int, ranks: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl", init_method=store, rank=rank, world_size=ranks, device_id=torch.device("cuda", rank)
        )
        value = work(*arguments)
        torch.cuda.synchronize()
        dist.barrier()
        queue.put((rank, True, value))
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
