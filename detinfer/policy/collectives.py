"""torch.distributed's operators, and what is decided about each: a pure function from a group to a decision.

Spelled as torch's dispatcher names them. ``c10d::`` operators are what every way of calling comes to: ``dist.*``,
functional collectives, DTensor, the coalescing manager, compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from detinfer.bits import dtype_name
from detinfer.collectives.calls import COPIED, OPS, REDUCED
from detinfer.policy.policy import Accepted, Proof, Refused

Collective = Literal["all_reduce", "reduce_scatter", "all_gather"]

SHARED_MEMORY = "csrc/all_reduce"
"""The path between ranks of one host that share memory."""

PEER_MEMORY = "cuda/all_reduce"
"""The path between GPUs of one host that reach each other's memory."""

ORDERED_GATHER = "ordered_gather"
"""The path of every other group: the backend's all_gather, then the ordered sum on each rank."""

BACKEND = "torch"
"""The path of the group's own backend."""

REDUCTIONS = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor", "premul_sum")
"""torch.distributed.ReduceOp's operations in the order of their numbers."""

COVERED: dict[str, Collective] = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::reduce_": "all_reduce",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::allgather_coalesced_": "all_gather",
}
"""The operators that are overridden, each with the collective that it is made of."""


def _named(namespace: str, names: str) -> frozenset[str]:
    return frozenset(f"{namespace}::{name}" for name in names.split())


MOVES = (
    _named(
        "c10d",
        "barrier monitored_barrier_ broadcast_ gather_ scatter_ alltoall_ alltoall_base_ send recv_ recv_any_source_",
    )
    | _named(
        "_c10d_functional",
        "wait_tensor _wrap_tensor_autograd broadcast broadcast_ all_to_all_single isend irecv batch_p2p_ops",
    )
    | {"_c10d_functional_autograd::all_to_all_single", "_dtensor::shard_dim_alltoall"}
)
"""Operators that move bytes between ranks: the backend's own path."""

_FUNCTIONAL = """
    all_reduce all_reduce_ all_reduce_coalesced all_reduce_coalesced_ reduce_scatter_tensor reduce_scatter_tensor_out
    reduce_scatter_tensor_coalesced all_gather_into_tensor all_gather_into_tensor_out all_gather_into_tensor_coalesced
"""

FORWARDS = _named("_c10d_functional", _FUNCTIONAL) | _named(
    "_c10d_functional_autograd", "all_gather_into_tensor reduce_scatter_tensor"
)
"""Operators that call a covered one, which is where they are decided."""


@dataclass(frozen=True)
class Ranks:
    """A group as a decision sees it.

    ``path`` is the one that all its ranks have; ``prove`` gives the proof of (collective, reduction, dtype) at its
    size, or the reason why there is none, and is called by all ranks together.
    """

    size: int
    path: str
    prove: Callable[[Collective, str, torch.dtype], Proof | Refused]


def decide_collective(op: str, reduction: str, dtype: torch.dtype, ranks: Ranks) -> Accepted | Refused:
    """The decision for ``op`` of COVERED with ``reduction`` (one of REDUCTIONS; empty for a gather) of ``dtype``."""
    collective = COVERED[op]
    if collective == "all_gather":
        if dtype not in COPIED:
            return Accepted(op, BACKEND, "moves bytes and computes nothing", portable=True)
        why = f"a copy of bytes between {_count(ranks.size)}"
    else:
        exact = not (dtype.is_floating_point or dtype.is_complex)
        if reduction not in OPS or (exact and dtype not in REDUCED):
            if exact and reduction not in ("avg", "premul_sum", "unknown"):
                return Accepted(op, BACKEND, "integers and booleans: exact in any order", portable=True)
            return Refused(op, BACKEND, _without_order(op, reduction))
        if dtype not in REDUCED:
            return Refused(
                op, ranks.path, f"{dtype_name(dtype)} has no canonical order over ranks: convert to float32 first"
            )
        if reduction == "avg" and exact:
            return Refused(op, ranks.path, "an average of integers has no rounding of its own: reduce with SUM")
        order = "in rank order" if reduction in ("sum", "avg") else "which no order changes"
        why = f"{reduction} over {_count(ranks.size)}, {order}"
    proof = ranks.prove(collective, reduction, dtype)
    if isinstance(proof, Refused):
        return Refused(op, ranks.path, proof.reason)
    return Accepted(op, ranks.path, why, proof, portable=True)


def _count(size: int) -> str:
    return "one rank" if size == 1 else f"{size} ranks"


def _without_order(op: str, reduction: str) -> str:
    return (
        f"a {reduction} over ranks has no canonical order: all_gather its terms and combine them in rank order, use "
        f"SUM, AVG, MAX or MIN, or, if its bits may depend on the group, list {op!r} in Policy(allow=...)"
    )
