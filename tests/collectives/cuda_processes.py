"""What the tests of real GPU processes run in each of them; a module of its own, so that a new process can import it."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from detinfer.collectives.cuda import connect
from detinfer.errors import DetinferError


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
