"""What the tests of real GPU processes run in each of them; a module of its own, so that a new process can import it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from detinfer.collectives.cuda import connect
from detinfer.collectives.cuda_native import Geometry
from detinfer.collectives.cuda_paths import VARIABLE
from detinfer.collectives.stress import cancelling
from detinfer.errors import DetinferError
from detinfer.reference.all_gather import all_gather
from detinfer.reference.all_reduce import all_reduce
from detinfer.reference.all_reduce_rms_norm import all_reduce_rms_norm
from detinfer.reference.reduce_scatter import reduce_scatter


def two_communicators() -> list[bool]:
    """Two communicators on streams of their own at once, then both closed and connected again."""
    found = []
    for _ in range(2):
        first, second = connect(timeout=10.0), connect(timeout=10.0)
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        x = torch.full((60000,), float(dist.get_rank() + 1), device="cuda")
        out = [torch.zeros_like(x), torch.zeros_like(x)]
        torch.cuda.synchronize()
        for _ in range(50):
            for comm, stream, each in zip((first, second), streams, out, strict=True):
                with torch.cuda.stream(stream):
                    comm.all_reduce(x, path="push_tiles", out=each)
        torch.cuda.synchronize()
        found += [bool((each == 3.0).all()) for each in out]
        first.close()
        second.close()
    return found


def absent() -> tuple[str, float] | None:
    """Rank 1 stays away; what rank 0 is told and after how many seconds."""
    comm = connect(timeout=1.0)
    start = time.monotonic()
    found = None
    if dist.get_rank() == 0:
        out = comm.all_reduce(torch.ones(4096, device="cuda"))
        torch.cuda.synchronize()
        try:
            comm.check()
        except DetinferError as error:
            found = (str(error), time.monotonic() - start)
            assert bool(out.isnan().all())
    comm.close()
    return found


def exits(rank: int, size: int, store: str, queue: Any) -> None:
    """A process of a group whose last rank ends without a word after a few calls; what the others are told."""
    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    comm = connect(timeout=2.0)
    x = torch.ones(4096, device="cuda")
    for _ in range(3):
        comm.all_reduce(x)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == size - 1:
        os._exit(0)
    time.sleep(1.0)
    comm.all_reduce(x)
    torch.cuda.synchronize()
    queue.put(_error(comm.check))


def refused() -> list[str]:
    """Rank 1 has a table that cannot be read, then another geometry, then a tensor of another GPU; what each is told."""
    found = []
    rank = dist.get_rank()
    if rank == 1:
        os.environ[VARIABLE] = "/nowhere/table.json"
    found.append(_error(connect))
    os.environ.pop(VARIABLE, None)
    found.append(_error(lambda: connect(geometry=Geometry(tile_channels=8 + rank))))
    with connect(timeout=10.0) as comm:
        elsewhere = torch.ones(8, device=f"cuda:{(rank + 1) % comm.size}")
        found.append(_error(lambda: comm.all_reduce(elsewhere)))
        found.append(_error(lambda: comm.all_gather(elsewhere)))
        assert float(comm.all_reduce(torch.ones(1, device="cuda"))) == comm.size  # and it works still
    return found


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except DetinferError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def told(rank: int) -> list[str]:
    """What ``rank`` is told in ``refused``, for the parent, which hears rank 0."""
    mine = refused()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return list(everyone[rank])


def in_graphs() -> list[int]:
    """torch.compile with Inductor's CUDA graphs, five calls with inputs of their own; elements with other bytes."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parts = [part.reshape(64, 256) for part in cancelling(ranks, 64 * 256, "bfloat16")]
    residual = parts[-1]
    norm, total = all_reduce_rms_norm(parts, residual, None, 1e-6, "bfloat16")
    expected = [
        all_reduce(parts, "bfloat16"),
        reduce_scatter(parts, rank, "bfloat16"),
        all_gather(parts, 1),
        norm,
        total,
    ]
    wanted = [torch.from_numpy(each.view(np.int16)).cuda() for each in expected]
    x, r = (torch.from_numpy(bits.view(np.int16)).cuda().view(torch.bfloat16) for bits in (parts[rank], residual))
    wrong = []
    with connect(timeout=120.0) as comm:

        def step(x: torch.Tensor, r: torch.Tensor) -> list[torch.Tensor]:
            x = x * 2.0 * 0.5  # exact; Inductor's neg() loses the sign of a zero
            return [
                comm.all_reduce(x),
                comm.reduce_scatter(x),
                comm.all_gather(x, dim=1),
                *comm.all_reduce_rms_norm(x, r, None, 1e-6),
            ]

        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            found = [each.clone() for each in compiled(x.clone(), r)]
            torch.cuda.synchronize()
            comm.check()
            wrong.append(sum(int((a.view(torch.int16) != b).sum()) for a, b in zip(found, wanted, strict=True)))
    return wrong


def compiled() -> tuple[bool, Any]:
    """A captured call beside allocations of expandable segments."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    comm = connect(timeout=10.0)
    x = torch.arange(5000, device="cuda").to(torch.bfloat16)
    total = comm.all_reduce(x)
    torch.cuda.synchronize()
    comm.check()
    same = torch.equal(total.view(torch.int16), (x.float() + x.float()).to(torch.bfloat16).view(torch.int16))
    comm.close()
    return same, total.shape
