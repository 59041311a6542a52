"""The short way of ``dist.all_reduce`` to the ranks' own memory, for calls like one that was decided before.

The operator that it comes to is overridden, which catches every way of calling; but torch's way to an operator written in
Python takes some 15 microseconds, as long as the sum itself. This replaces the function by one that knows calls that
were decided: a dense tensor of the same dtype, kind of device, reduction and group, under the same policy, on the thread
that entered it, with nothing tracing. Any other call goes the operator's way, and so does ``all_reduce`` imported before.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from detinfer.policy.groups import Groups
from detinfer.policy.state import STATE
from detinfer.torch_alone import ALONE

_OPS: Any = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MIN, dist.ReduceOp.MAX)
_modes: Any = torch._C._len_torch_dispatch_stack
_functions: Any = torch._C._len_torch_function_stack


class Front:
    """``torch.distributed.all_reduce`` replaced, until ``remove``."""

    def __init__(self, groups: Groups) -> None:
        self._original: Any = distributed_c10d.all_reduce
        self._on = True
        original, world, strided = self._original, distributed_c10d._world, torch.strided
        default: Any = dist.ReduceOp.SUM
        # By identity: torch compares its enumeration in microseconds. Any other object that says the same goes round.
        numbers = {id(op): int(op) for op in _OPS}

        @functools.wraps(original)
        def all_reduce(tensor: Any, op: Any = default, group: Any = None, async_op: bool = False) -> Any:
            if async_op or type(tensor) is not Tensor or not self._on:
                return original(tensor, op, group, async_op)
            number = numbers.get(id(op))
            entry = STATE.innermost()
            ranks = groups.known_to(world.default_pg if group is None else group, tensor)
            if (
                ranks is None
                or entry is None
                or entry.trace is not None
                or ranks.policy is not entry.policy
                or ALONE.thread is not None
                or tensor.layout is not strided
                or tensor.is_neg()
                or world.pg_coalesce_state
                or _modes()
                or _functions()
                or (found := ranks.fast.get((number, tensor.dtype))) is None
            ):
                return original(tensor, op, group, async_op)
            reduction, key, decision = found
            if STATE.ledger is not None:
                STATE.ledger.note(key[0], key[1], decision)
            ranks.communicator.all_reduce(tensor, op=reduction, out=tensor)  # type: ignore[union-attr]
            return None

        all_reduce._torchdynamo_disable = True  # type: ignore[attr-defined]  # never traced: it asks for what is in force
        self._replacement = all_reduce
        distributed_c10d.all_reduce = dist.all_reduce = all_reduce

    def remove(self) -> None:
        """Give torch its own function back; who kept the other one gets the original through it."""
        self._on = False
        for module in (distributed_c10d, dist):
            if module.all_reduce is self._replacement:
                module.all_reduce = self._original  # type: ignore[attr-defined]
