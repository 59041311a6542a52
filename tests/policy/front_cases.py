"""The short way of ``dist.all_reduce``, run by three processes over gloo: ``python front_cases.py FOLDER``.

Each writes what it saw to ``FOLDER/RANK.json``. ``python front_cases.py FOLDER cuda``: a process for each GPU over NCCL.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import all_reduce as bound_early
from torch.distributed.distributed_c10d import _coalescing_manager

from detinfer.collectives.communicator import Communicator
from detinfer.collectives.cuda import CudaCommunicator
from detinfer.collectives.stress import cancelling
from detinfer.policy import deterministic
from detinfer.policy.state import STATE
from detinfer.reference.all_reduce import all_reduce as reference

COUNT = 400


def stored(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).cpu().numpy().tobytes()


class Own(torch.Tensor):
    """A subclass: it goes by the operator."""


def run(rank: int, size: int, folder: str, device: str) -> None:
    faulthandler.dump_traceback_later(100, exit=True)  # where a rank that waits for ever stands
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    plain = dist.all_reduce
    slow: list[str] = []
    communicator: Any = CudaCommunicator if device == "cuda" else Communicator
    call = communicator.all_reduce

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        # Which way a call came: from the operator's override (policy/distributed.py) or from the front.
        frame: Any = sys._getframe(1)
        slow.append("front" if frame.f_code.co_filename.endswith("front.py") else "operator")
        return call(self, *arguments, **options)

    communicator.all_reduce = counted
    drawn = {name: cancelling(size, COUNT // 2, name) for name in ("float32", "bfloat16")}  # type: ignore[arg-type]
    # Moved on by one rank in the second half, so that both rotations of three ranks show.
    parts = {name: [np.concatenate([part, all_[r - 1]]) for r, part in enumerate(all_)] for name, all_ in drawn.items()}

    def own(name: str = "float32") -> torch.Tensor:
        return torch.from_numpy(parts[name][rank].view(np.uint8).copy()).to(device).view(getattr(torch, name))

    def one(what: str, work: Any, name: str = "float32") -> None:
        slow.clear()
        got = stored(work(own(name)))
        want = reference(parts[name], name).tobytes()  # type: ignore[arg-type]
        found[what] = [list(slow), got == want]

    def reduced(x: torch.Tensor, **options: Any) -> torch.Tensor:
        dist.all_reduce(x, **options)
        return x

    def early(x: torch.Tensor) -> torch.Tensor:
        bound_early(x)
        return x

    def waited(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, async_op=True).wait()
        return x

    def coalesced(x: torch.Tensor) -> torch.Tensor:
        with _coalescing_manager():
            dist.all_reduce(x)
        return x

    def strided(x: torch.Tensor) -> torch.Tensor:
        room = torch.zeros(COUNT, 2, device=device)
        room[:, 0] = x
        dist.all_reduce(room[:, 0])
        assert not room[:, 1].any()
        return room[:, 0].contiguous()

    def on_a_thread(x: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: dist.all_reduce(x))
        thread.start()
        thread.join()
        return x

    with deterministic("batch", uncovered="trust"):
        one("first", reduced)
        one("second", reduced)
        one("by name", lambda x: reduced(x, op=dist.ReduceOp.SUM, group=dist.group.WORLD))
        one("bfloat16 first", reduced, "bfloat16")
        one("bfloat16 second", reduced, "bfloat16")
        one("early", early)
        one("async", waited)
        one("coalesced", coalesced)
        one("strided", strided)
        one("thread", on_a_thread)
        one("subclass", lambda x: reduced(x.as_subclass(Own)).as_subclass(torch.Tensor))
        x = own()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        found["max"] = stored(x) == reference(parts["float32"], "float32", "max").tobytes()
        with deterministic("batch"):
            one("traced", reduced)
        with deterministic("batch", uncovered="trust"):
            one("inner first", reduced)
            one("inner second", reduced)
        kept = dist.all_reduce
        found["replaced"] = kept is not plain
    found["restored"] = dist.all_reduce is plain and dist.distributed_c10d.all_reduce is plain
    slow.clear()
    x = own()
    kept(x)
    found["kept"] = [list(slow), stored(x) == reference(parts["float32"], "float32").tobytes()]
    found["left"] = STATE.innermost() is None
    rotated = [*parts["float32"][1:], parts["float32"][0]]
    found["order shows"] = reference(rotated, "float32").tobytes() != reference(parts["float32"], "float32").tobytes()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    size = min(torch.cuda.device_count(), 8) if device == "cuda" else 3
    start: Any = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    ranks = [start.Process(target=run, args=(rank, size, sys.argv[1], device)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))
