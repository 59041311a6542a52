"""More that the processes of distributed_cases.py do: every dtype and reduction, groups without shared memory, refusals,
ranks that differ, groups that end, and transformers' own tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import transformers
from distributed_cases import CASES, World, outcome

from detinfer.bits import as_bytes, dtype_name
from detinfer.collectives import communicator
from detinfer.errors import DetinferError
from detinfer.models.tensor_parallel import SUMMED, styles
from detinfer.policy import Policy, deterministic
from detinfer.policy.rank_proofs import inputs, tensor
from detinfer.reference.all_reduce import all_reduce as reference

OPS = {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.AVG, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.uint8)
GATHERED = ("all_reduce", "reduce_scatter", "functional_all_reduce", "colwise_rowwise", "all_gather", "reduce")


def table(w: World, folder: Path) -> dict[str, bool]:
    """Every canonical reduction in every dtype."""
    found = {}
    with deterministic("batch"):
        for dtype in (*FLOATS, *INTEGERS):
            for name, op in OPS.items():
                if name == "avg" and dtype in INTEGERS:
                    continue
                parts, whole = inputs("all_reduce", name, dtype, w.size)
                x = tensor(parts[w.rank], dtype)
                dist.all_reduce(x, op=op)
                found[f"{name} {dtype_name(dtype)}"] = as_bytes(x) == whole.tobytes()
        exact = torch.tensor([3, -5, w.rank + 2], dtype=torch.int32)
        dist.all_reduce(exact, op=dist.ReduceOp.PRODUCT)
        found["product int32"] = exact.tolist() == [3**w.size, (-5) ** w.size, int(np.prod(range(2, w.size + 2)))]
    return found


def gathered(w: World, folder: Path) -> dict[str, Any]:
    """Ranks that say that they are on hosts of their own: no shared memory."""
    with mock.patch.object(communicator, "host", return_value=f"host {w.rank}"), deterministic("batch") as active:
        found: dict[str, Any] = {name: outcome(CASES[name], w) for name in GATHERED}
        for dtype in FLOATS:
            for name, op in OPS.items():
                parts, whole = inputs("all_reduce", name, dtype, w.size)
                x = tensor(parts[w.rank], dtype)
                dist.all_reduce(x, op=op)
                found[f"{name} {dtype_name(dtype)}"] = {"same": as_bytes(x) == whole.tobytes()}
    return {"cases": found, "decisions": [row for row in active.decisions_json() if row["op"].startswith("c10d::")]}


def one_without_memory(w: World, folder: Path) -> dict[str, Any]:
    """The last rank alone has no shared memory: all of them go the other way."""
    connect = communicator.rendezvous.share

    def share(*args: Any) -> None:
        connect(*args)
        if w.rank == w.size - 1:
            raise OSError("no memory left")

    with mock.patch.object(communicator.rendezvous, "share", share), deterministic("batch") as active:
        found = outcome(CASES["all_reduce"], w)
    return found | {"paths": sorted({d.path for d in active.decisions.values() if d.op.startswith("c10d::")})}


def _error(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except DetinferError as error:
        return [type(error).__name__, str(error)]
    except Exception as error:
        return ["other", repr(error)]
    return ["none", ""]


class Block(torch.nn.Module):
    """Multiplies over ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A product."""
        dist.all_reduce(x, op=dist.ReduceOp.PRODUCT)
        return x


def refused(w: World, folder: Path) -> dict[str, list[str]]:
    """What no order covers, and ranks that differ."""
    model = torch.nn.Sequential(torch.nn.Identity(), Block())
    ints = torch.ones(3, dtype=torch.int32)
    eighth = w.own().to(torch.float8_e4m3fn)
    found = {}
    for name, uncovered in (("traced", "refuse"), ("trusted", "trust")):
        with deterministic("batch", uncovered=uncovered):  # type: ignore[arg-type]
            found[f"product, {name}"] = _error(lambda: model(w.own()))
    with deterministic("batch"):
        found["premul"] = _error(lambda: dist.all_reduce(w.own(), op=dist._make_nccl_premul_sum(2.0)))
        found["avg of integers"] = _error(lambda: dist.all_reduce(ints, op=dist.ReduceOp.AVG))
        found["float8"] = _error(lambda: dist.all_reduce(eighth))
        found["ranks differ"] = _error(lambda: dist.all_reduce(torch.ones(5 + w.rank)))
        found["afterwards"] = ["same" if outcome(CASES["all_reduce"], w).get("same") else "other"]
    with deterministic(Policy(allow=("c10d::allreduce_",))):
        x = torch.full((3,), 2.0)
        dist.all_reduce(x, op=dist.ReduceOp.PRODUCT)
        found["allowed"] = [str(x.tolist() == [2.0**w.size] * 3)]
    return found


def group_ends(w: World, folder: Path) -> list[Any]:
    """A group made, used and destroyed inside a policy, three times; the communicator goes with it."""
    found: list[Any] = []
    with deterministic("batch"):
        for _ in range(3):
            group = dist.new_group(list(range(w.size)))
            x = w.own()
            dist.all_reduce(x, group=group)
            dist.destroy_process_group(group)
            found.append(as_bytes(x) == w.total)
            del group
    return found


def llama(w: World, folder: Path) -> dict[str, Any]:
    """A random Llama by ``from_pretrained(..., tp_plan="auto")``: every sum over ranks against the reference."""
    place = folder / "llama"
    if w.rank == 0 and not place.exists():
        config = transformers.LlamaConfig(
            hidden_size=48,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=12,
            num_key_value_heads=12,
            vocab_size=96,
        )
        random = torch.Generator().manual_seed(0)
        with torch.device("cpu"), torch.no_grad():
            model = transformers.LlamaForCausalLM(config)
            for name, weight in model.named_parameters():
                if "norm" not in name:
                    weight.copy_(torch.randint(-4096, 4097, weight.shape, generator=random) / 2.0**14)
        model.save_pretrained(place)
    dist.barrier()
    plan = {"tp_plan": "auto", "tp_size": w.size}
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **plan).eval()
    tokens = torch.arange(3 * 7).reshape(3, 7) * 5 % 96
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(op: str, args: tuple[Any, ...], kwargs: Any, decision: Any) -> None:
        if op == "c10d::allreduce_":
            seen.append((args[0][0].clone(), args[0][0]))

    with torch.no_grad():
        model(tokens)  # outside: so that nothing is made for the first time inside
        with deterministic("batch", on_call=note) as active:
            logits = model(tokens).logits
        with deterministic("batch"):
            alone = model(tokens[1:2]).logits
    same = rotated = gloo = 0
    for before, after in seen:
        parts = [torch.empty_like(before) for _ in range(w.size)]
        dist.all_gather(parts, before)
        ranks = [part.cpu().numpy().view(np.uint32) for part in parts]
        want = reference(ranks, "float32").tobytes()
        same += as_bytes(after) == want
        rotated += reference([*ranks[1:], ranks[0]], "float32").tobytes() != want
        dist.all_reduce(before)
        gloo += as_bytes(before) != want
    everyone = [torch.empty_like(logits) for _ in range(w.size)]
    dist.all_gather(everyone, logits.contiguous())
    return {
        "planned": sum(style in SUMMED for style in styles(model).values()),
        "sums": len(seen),
        "same": same,
        "rotated": rotated,
        "gloo": gloo,
        "ranks agree": len({as_bytes(one) for one in everyone}) == 1,
        "alone": as_bytes(alone[0]) == as_bytes(logits[1]),
        "counts": {op: n for (op, _), n in active.counts.items() if op.startswith("c10d::")},
    }


EXTRAS: dict[str, Callable[[World, Path], Any]] = {
    "table": table,
    "gathered": gathered,
    "one_without_memory": one_without_memory,
    "refused": refused,
    "group_ends": group_ends,
    "llama": llama,
}
