"""Ways of calling a collective, run by real processes over gloo, inside a policy and outside; results as JSON.

``python distributed_cases.py FOLDER``: four processes, forked from one that has imported everything, form worlds of 2, 3
and 4 ranks one after the other and run every case in each. The test reads ``FOLDER/SIZE-RANK.json``.

``python distributed_cases.py FOLDER cuda``: a process for each GPU, NCCL in place of gloo, the same cases on its tensors.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # before the fork: its import takes seconds
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.distributed.distributed_c10d import all_reduce as bound_early
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from detinfer.collectives.stress import cancelling
from detinfer.policy import deterministic
from detinfer.policy.rank_proofs import stored
from detinfer.reference.all_reduce import all_reduce as reference

SIZES = (2, 3, 4)
SHARE = 64


class World:
    """This rank among ``size``: the ranks' elements, and what must come of them."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        found = cancelling(size, size * SHARE, "float32")
        # Moved on by one, so that any rotation of any number of ranks shows; and +0, which a product gives too.
        self.parts = [
            np.concatenate([part, found[r - 1]])
            & np.where(np.concatenate([part, found[r - 1]]) == 1 << 31, 0, 0xFFFFFFFF)
            for r, part in enumerate(found)
        ]
        self.parts = [part.astype(np.uint32) for part in self.parts]
        self.total = self.sum(range(size))
        self.mesh: Any = None

    def sum(self, ranks: Any) -> bytes:
        """The reference's sum over these ranks in this order."""
        return reference([self.parts[r] for r in ranks], "float32").tobytes()

    def own(self) -> torch.Tensor:
        """This rank's elements: a new tensor each time."""
        return torch.from_numpy(self.parts[self.rank].view(np.float32).copy()).to(torch.get_default_device())

    def slice(self, whole: bytes) -> bytes:
        """This rank's slice of ``whole``."""
        width = len(whole) // self.size
        return whole[self.rank * width : (self.rank + 1) * width]


Case = Callable[[World], "tuple[list[torch.Tensor], list[bytes]]"]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """A way of calling: gives the results and the bytes that they must have."""
    CASES[function.__name__] = function
    return function


def _empty(w: World, share: bool = True) -> torch.Tensor:
    return torch.empty(w.own().numel() // (w.size if share else 1))


@case
def all_reduce(w: World) -> Any:
    """dist.all_reduce(x)"""
    x = w.own()
    assert dist.all_reduce(x) is None
    return [x], [w.total]


@case
def all_reduce_async(w: World) -> Any:
    """dist.all_reduce(x, async_op=True).wait()"""
    x = w.own()
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert work.is_completed()
    return [x, work.get_future().value()[0]], [w.total] * 2


@case
def all_reduce_bound_early(w: World) -> Any:
    """from torch.distributed import all_reduce"""
    x = w.own()
    bound_early(x)
    return [x], [w.total]


@case
def group_allreduce(w: World) -> Any:
    """group.allreduce([x]).wait()"""
    x = w.own()
    dist.group.WORLD.allreduce([x]).wait()
    return [x], [w.total]


@case
def all_reduce_subgroup(w: World) -> Any:
    """dist.all_reduce(x, group=dist.new_group(ranks))"""
    group, x = dist.new_group(list(range(w.size))), w.own()
    dist.all_reduce(x, group=group)
    return [x], [w.total]


@case
def all_reduce_coalesced(w: World) -> Any:
    """dist.all_reduce_coalesced([x, y])"""
    x, y = w.own(), w.own()[:5]
    dist.all_reduce_coalesced([x, y])
    return [x, y], [w.total, w.total[:20]]


@case
def coalescing_manager(w: World) -> Any:
    """with _coalescing_manager(): dist.all_reduce(x)"""
    x, y = w.own(), w.own()
    with _coalescing_manager():
        dist.all_reduce(x)
        dist.all_reduce(y)
    return [x, y], [w.total] * 2


@case
def reduce(w: World) -> Any:
    """dist.reduce(x, root)"""
    x = w.own()
    dist.reduce(x, w.size - 1)
    return ([x], [w.total]) if w.rank == w.size - 1 else ([], [])


@case
def reduce_scatter(w: World) -> Any:
    """dist.reduce_scatter(out, [slices])"""
    out = _empty(w)
    dist.reduce_scatter(out, list(w.own().chunk(w.size)))
    return [out], [w.slice(w.total)]


@case
def reduce_scatter_tensor(w: World) -> Any:
    """dist.reduce_scatter_tensor(out, x)"""
    out = _empty(w)
    dist.reduce_scatter_tensor(out, w.own())
    return [out], [w.slice(w.total)]


@case
def reduce_scatter_coalesced(w: World) -> Any:
    """group.reduce_scatter_tensor_coalesced([out], [x])"""
    out, other = _empty(w), _empty(w)
    dist.group.WORLD.reduce_scatter_tensor_coalesced([out, other], [w.own(), w.own()]).wait()
    return [out, other], [w.slice(w.total)] * 2


@case
def functional_all_reduce(w: World) -> Any:
    """funcol.all_reduce(x, "sum", group)"""
    return [fc.all_reduce(w.own(), "sum", dist.group.WORLD) + 0], [w.total]


@case
def functional_all_reduce_inplace(w: World) -> Any:
    """torch.ops._c10d_functional.all_reduce_(x, "sum", group)"""
    x = w.own()
    ops = torch.ops._c10d_functional
    ops.wait_tensor(ops.all_reduce_(x, "sum", dist.group.WORLD.group_name))
    return [x], [w.total]


@case
def functional_all_reduce_coalesced(w: World) -> Any:
    """funcol.all_reduce_coalesced([x, y], "sum", group)"""
    found = fc.all_reduce_coalesced([w.own(), w.own()], "sum", dist.group.WORLD)
    return [x + 0 for x in found], [w.total] * 2


@case
def functional_reduce_scatter(w: World) -> Any:
    """funcol.reduce_scatter_tensor(x, "sum", 0, group)"""
    return [fc.reduce_scatter_tensor(w.own(), "sum", 0, dist.group.WORLD) + 0], [w.slice(w.total)]


@case
def functional_reduce_scatter_coalesced(w: World) -> Any:
    """funcol.reduce_scatter_tensor_coalesced([x], "sum", [0], group)"""
    found = fc.reduce_scatter_tensor_coalesced([w.own()], "sum", [0], dist.group.WORLD)
    return [found[0] + 0], [w.slice(w.total)]


@case
def dtensor_partial_to_replicate(w: World) -> Any:
    """DTensor: Partial to Replicate"""
    x = DTensor.from_local(w.own(), w.mesh, [Partial()])
    return [x.redistribute(w.mesh, [Replicate()]).to_local()], [w.total]


@case
def dtensor_partial_to_shard(w: World) -> Any:
    """DTensor: Partial to Shard"""
    x = DTensor.from_local(w.own(), w.mesh, [Partial()])
    return [x.redistribute(w.mesh, [Shard(0)]).to_local()], [w.slice(w.total)]


class Mlp(torch.nn.Module):
    """One number up to a column for each rank, and down: each rank's partial sum is its elements."""

    def __init__(self, w: World) -> None:
        super().__init__()
        self.up = torch.nn.utils.skip_init(torch.nn.Linear, 1, w.size, bias=False)
        self.down = torch.nn.utils.skip_init(torch.nn.Linear, w.size, len(w.parts[0]), bias=False)
        with torch.no_grad():
            self.up.weight.fill_(1.0)
            for r, part in enumerate(w.parts):
                self.down.weight[:, r] = torch.from_numpy(part.view(np.float32).copy())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Up, then down."""
        return self.down(self.up(x))


@case
def colwise_rowwise(w: World) -> Any:
    """ColwiseParallel, RowwiseParallel"""
    with torch.no_grad():
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        y = parallelize_module(Mlp(w).eval(), w.mesh, plan)(torch.ones(1, 1)) + 0
    return [y], [w.total]


def _twice(x: torch.Tensor) -> torch.Tensor:
    return fc.all_reduce(x, "sum", dist.group.WORLD) + 0


@case
def compiled(w: World) -> Any:
    """torch.compile of funcol.all_reduce, which runs uncompiled inside"""
    torch._dynamo.reset()  # a graph that was made before holds a group that is gone
    return [torch.compile(_twice, backend="aot_eager")(w.own())], [w.total]


@case
def compiled_running(w: World) -> Any:
    """the same, compiled code running (torch.compiler.set_stance("default"))"""
    torch._dynamo.reset()
    with torch.compiler.set_stance("default"):
        seen: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            seen.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        result = torch.compile(_twice, backend=backend)(w.own())
        assert seen, "nothing was compiled"
    return [result], [w.total]


def _everyone(w: World) -> bytes:
    return b"".join(part.tobytes() for part in w.parts)


@case
def all_gather(w: World) -> Any:
    """dist.all_gather([outs], x)"""
    outs = [torch.empty_like(w.own()) for _ in range(w.size)]
    dist.all_gather(outs, w.own())
    return [torch.cat(outs)], [_everyone(w)]


@case
def all_gather_into_tensor(w: World) -> Any:
    """dist.all_gather_into_tensor(out, x)"""
    out = torch.empty(w.size * w.own().numel())
    dist.all_gather_into_tensor(out, w.own())
    return [out], [_everyone(w)]


@case
def all_gather_coalesced(w: World) -> Any:
    """group.all_gather_into_tensor_coalesced([out], [x])"""
    out = torch.empty(w.size * w.own().numel())
    dist.group.WORLD.allgather_into_tensor_coalesced([out], [w.own()]).wait()
    return [out], [_everyone(w)]


@case
def functional_all_gather(w: World) -> Any:
    """funcol.all_gather_tensor(x, 0, group)"""
    return [fc.all_gather_tensor(w.own(), 0, dist.group.WORLD) + 0], [_everyone(w)]


@case
def dtensor_shard_to_replicate(w: World) -> Any:
    """DTensor: Shard to Replicate"""
    x = DTensor.from_local(w.own(), w.mesh, [Shard(0)])
    return [x.redistribute(w.mesh, [Replicate()]).to_local()], [_everyone(w)]


def outcome(function: Case, w: World) -> dict[str, Any]:
    """What a case gave: whether its bytes are the expected ones, or its error."""
    try:
        results, wanted = function(w)
        assert len(results) == len(wanted)
        return {"same": all(stored(r) == b for r, b in zip(results, wanted, strict=True)), "results": len(results)}
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error), "trace": traceback.format_exc()[-1500:]}


TRUSTED = ("all_reduce", "functional_all_reduce", "colwise_rowwise", "compiled_running", "reduce_scatter")
"""Cases that are run without tracing too."""

ON_GPUS = ("llama",)
"""Extras that are run between GPUs too."""


def _since(before: Any, now: Any) -> dict[str, int]:
    """How often each collective was called since ``before``."""
    return {
        op: n - before.get((op, d), 0)
        for (op, d), n in now.items()
        if op.startswith("c10d::") and n != before.get((op, d), 0)
    }


def run_world(rank: int, size: int, folder: Path, device: str) -> None:
    """Every case at one size, on this rank: first the backend's own, then inside the policy, traced and trusted."""
    import distributed_extras

    start, backend = f"file://{folder}/store-{size}", "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=start, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    w = World(rank, size)
    w.mesh = init_device_mesh(device, (size,), mesh_dim_names=("tp",))
    found: dict[str, Any] = {
        "rotated": [w.sum([*range(f, size), *range(f)]) != w.total for f in range(1, size)],
        "plain": {name: outcome(function, w) for name, function in CASES.items()},
    }
    with deterministic("batch") as active:
        found["inside"] = {}
        for name, function in CASES.items():
            before = active.counts
            found["inside"][name] = {"counts": before} | outcome(function, w)
            found["inside"][name]["counts"] = _since(before, active.counts)
    found["decisions"] = [row for row in active.decisions_json() if row["op"].startswith("c10d::")]
    with deterministic("batch", uncovered="trust"):
        found["trusted"] = {name: outcome(CASES[name], w) for name in TRUSTED}
    found["again"] = {name: outcome(CASES[name], w) for name in ("all_reduce", "functional_all_reduce")}
    for name, extra in distributed_extras.EXTRAS.items():
        if device == "cpu" or name in ON_GPUS:
            found[name] = extra(w, folder)
    (folder / f"{size}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def work(rank: int, folder: Path, sizes: tuple[int, ...] = SIZES, device: str = "cpu") -> None:
    """One process: a rank of every world that is large enough."""
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(300, exit=True)  # where a rank that waits for ever stands
    torch.set_num_threads(1)
    if device == "cuda":
        os.environ["LOCAL_RANK"] = str(rank)  # by it transformers' tensor parallelism chooses its GPU
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    try:
        for size in sizes:
            if rank < size:
                run_world(rank, size, folder, device)
    except BaseException:
        (folder / f"crash-{rank}.txt").write_text(traceback.format_exc())
        raise


def main(folder: Path, device: str = "cpu") -> int:
    """Fork the processes (a GPU's cannot be forked: start them) and wait for them."""
    import distributed_extras  # noqa: F401  (what it imports is imported once)

    sizes = SIZES if device == "cpu" else (min(torch.cuda.device_count(), 8),)
    start: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    processes = [start.Process(target=work, args=(rank, folder, sizes, device)) for rank in range(max(sizes))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    # The extras import this file by its name: one module, not two.
    sys.modules["distributed_cases"] = sys.modules["__main__"]
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
