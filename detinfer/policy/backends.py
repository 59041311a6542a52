"""A collective by its group's own backend, for the calls that a policy leaves to it: exact, a copy, or allowed.

The backend's methods are called, not the operators' kernels: a kernel called from Python keeps Python's lock, for which a
backend's thread may wait while the kernel waits for that thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from detinfer.errors import RefusedError
from detinfer.policy.refusals import message

_c10d: Any = torch._C._distributed_c10d

_METHODS: dict[str, tuple[tuple[str, ...], str, int]] = {
    # operator: (the backend's method under its names by version, its options, how many tensor arguments)
    "c10d::allreduce_": (("allreduce",), "AllreduceOptions", 1),
    "c10d::allreduce_coalesced_": (("allreduce_coalesced",), "AllreduceCoalescedOptions", 1),
    "c10d::reduce_": (("reduce",), "ReduceOptions", 1),
    "c10d::reduce_scatter_": (("reduce_scatter",), "ReduceScatterOptions", 2),
    "c10d::_reduce_scatter_base_": (("_reduce_scatter_base", "reduce_scatter_single"), "ReduceScatterOptions", 2),
    "c10d::reduce_scatter_tensor_coalesced_": (
        ("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
        "ReduceScatterOptions",
        2,
    ),
    "c10d::allgather_": (("allgather",), "AllgatherOptions", 2),
    "c10d::_allgather_base_": (("_allgather_base", "all_gather_single"), "AllgatherOptions", 2),
    "c10d::allgather_into_tensor_coalesced_": (
        ("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
        "AllgatherOptions",
        2,
    ),
    "c10d::allgather_coalesced_": (("allgather_coalesced",), "AllgatherOptions", 2),
}

_ALONE = frozenset(name for name in _METHODS if "coalesced" in name or name == "c10d::reduce_")
"""Operators that return a Work alone; the others return what they wrote, too."""

_PREMUL = 8


def through(name: str, args: Sequence[Any]) -> Any:
    """The operator ``name`` with its arguments, by its group's backend. Raises RefusedError for PREMUL_SUM."""
    methods, kind, count = _METHODS[name]
    tensors, rest = args[:count], args[count:]
    group: Any = dist.ProcessGroup.unbox(rest[0])
    options = getattr(_c10d, kind)()
    if "gather" not in name:
        number = rest[1].op()
        if number == _PREMUL:
            raise RefusedError(
                message(f"{name} (premul_sum)", "its factor cannot be handed on: multiply, then use SUM")
            )
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.RedOpType(number))
    if name == "c10d::reduce_":
        options.rootRank, options.rootTensor = rest[2], rest[3]
    backend = group._get_backend(_first(tensors).device)
    method = next(getattr(backend, one) for one in methods if hasattr(backend, one))
    work = method(*tensors, options).boxed()
    return work if name in _ALONE else (tensors[0], work)


def _first(values: Any) -> Any:
    while not isinstance(values, torch.Tensor):
        values = values[0]
    return values
