"""torch.distributed's operators put in the place of the backends', for the whole process, until they are taken out.

A ``c10d::`` operator is what every way of calling a collective comes to, so that overriding it catches them all:
``dist.all_reduce`` (also imported by name before), ``group.allreduce``, functional collectives, DTensor, coalesced and
compiled code. It runs on the calling thread and is done when it returns, also with ``async_op=True``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from detinfer.bits import dtype_name
from detinfer.errors import RefusedError
from detinfer.policy.backends import through
from detinfer.policy.collectives import BACKEND, COVERED, PEER_MEMORY, REDUCTIONS, SHARED_MEMORY
from detinfer.policy.decide import Known, decide
from detinfer.policy.front import Front
from detinfer.policy.groups import Group, Groups
from detinfer.policy.policy import Accepted, Decision, Refused
from detinfer.policy.refusals import message
from detinfer.policy.state import STATE
from detinfer.torch_alone import ALONE

_c10d: Any = torch._C._distributed_c10d

DEVICES = ("CPU", "CUDA")


class Distributed:
    """Every operator of ``collectives.COVERED``, installed for CPU and CUDA tensors until ``remove``."""

    def __init__(self, known: Known) -> None:
        self._groups = Groups()
        self._front: Front | None = None
        library: Any = torch.library.Library  # untyped in torch
        self._library = library("c10d", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="(?s).*overriding a previously registered kernel")
                for name in (*COVERED, *_unknown()):
                    for device in DEVICES:
                        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, device):
                            continue
                        call = _override(name, _RUN.get(name), self._groups, known)
                        short = name.removeprefix("c10d::")
                        self._library.impl(short, call, device, allow_override=True)
            self._front = Front(self._groups)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Give the operators back to the backends, and leave every group."""
        if self._front is not None:
            self._front.remove()
        self._library._destroy()
        self._groups.close()


def _unknown() -> list[str]:
    """Operators of this torch that reduce over ranks and are not in our table: refused, whatever they do."""
    return [
        f"{schema.name}.{schema.overload_name}".rstrip(".")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("c10d::")
        and schema.name not in COVERED
        and any("ReduceOp" in str(argument.type) for argument in schema.arguments)
    ]


def _override(name: str, run: Callable[..., Any] | None, groups: Groups, known: Known) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if ALONE.here():
            return through(name, args)  # ranks that are being joined, or a proof, talk by the backend itself
        if run is None:
            raise RefusedError(message(name, "this version of torch has it and no proof covers it"))
        done = run(_Call(name, args, groups, known), *args)
        return through(name, args) if done is None else done

    return call


class _Call:
    """One call of an operator: decides it for each dtype, and notes the decision."""

    def __init__(self, name: str, args: tuple[Any, ...], groups: Groups, known: Known) -> None:
        self._name, self._args, self._groups, self._known = name, args, groups, known

    def group(self, boxed: Any, tensors: Sequence[Tensor], op: Any = None) -> tuple[Group | None, str]:
        """(the group, or None where the policy sends the call to the backend; the name of the reduction)."""
        number = -1 if op is None else op.op()
        reduction = "" if op is None else REDUCTIONS[number] if 0 <= number < len(REDUCTIONS) else "unknown"
        found: Group | None = None
        backend = False
        for tensor in tensors:
            if found is None:
                found = self._groups.of(dist.ProcessGroup.unbox(boxed), tensor.device)
            backend |= self._settle(found, number, reduction, tensor.dtype) == BACKEND
        return None if backend else found, reduction

    def _settle(self, group: Group, number: int, reduction: str, dtype: torch.dtype) -> str:
        policy = STATE.policy()
        if group.policy is not policy:
            group.policy, group.settled, group.fast = policy, {}, {}
        memo = (self._name, number, dtype)
        found: tuple[Decision, Any] | None = group.settled.get(memo)
        if found is None:
            ranks = group.ranks(COVERED[self._name], dtype)
            decision = decide(policy, self._name, (dtype,), self._known, variant=reduction, ranks=ranks)
            how = ", ".join(filter(None, (reduction, f"{group.size} ranks")))
            found = group.settled[memo] = decision, (f"{self._name}({how})", (dtype,))
            own = isinstance(decision, Accepted) and decision.path in (SHARED_MEMORY, PEER_MEMORY)
            if own and self._name == "c10d::allreduce_":
                group.fast[number, dtype] = reduction, found[1], decision  # type: ignore[assignment]
        decision, key = found
        trace = STATE.trace()
        if trace is not None:
            trace.note(key, decision, self._args)
        if STATE.ledger is not None:
            op, dtypes = key
            STATE.ledger.note(op, dtypes, decision)
        if isinstance(decision, Refused):
            where = trace.where() if trace is not None else ""
            what = f"{self._name}{f' ({reduction})' if reduction else ''} on {dtype_name(dtype)}"
            raise RefusedError(message(what, decision.reason, where))
        assert isinstance(decision, Accepted)
        return decision.path


def _one(call: _Call, tensors: Sequence[Tensor], what: str) -> None:
    if len(tensors) != 1:
        raise RefusedError(message(what, f"{len(tensors)} tensors in one call have no order: call it for each"))


def _allreduce(
    call: _Call,
    tensors: list[Tensor],
    group: Any,
    op: Any,
    sparse: Any = None,
    async_op: bool = True,
    timeout: int = -1,
) -> Any:
    _one(call, tensors, "c10d::allreduce_")
    if sparse is not None:
        raise RefusedError(message("c10d::allreduce_", "a sparse tensor has no canonical order: make it dense"))
    ranks, reduction = call.group(group, tensors, op)
    if ranks is None:
        return None
    ranks.all_reduce(tensors[0], reduction)
    return tensors, _done(tensors, async_op)


def _allreduce_coalesced(
    call: _Call, tensors: list[Tensor], group: Any, op: Any, async_op: bool = True, timeout: int = -1
) -> Any:
    ranks, reduction = call.group(group, tensors, op)
    if ranks is None:
        return None
    for tensor in tensors:
        ranks.all_reduce(tensor, reduction)
    return _done(tensors, async_op)


def _reduce(
    call: _Call,
    tensors: list[Tensor],
    group: Any,
    op: Any,
    root: int,
    root_tensor: int,
    async_op: bool = True,
    timeout: int = -1,
) -> Any:
    _one(call, tensors, "c10d::reduce_")
    ranks, reduction = call.group(group, tensors, op)
    if ranks is None:
        return None
    ranks.all_reduce(tensors[0], reduction, write=ranks.rank == root)
    return _done(tensors, async_op)


def _reduce_scatter(
    call: _Call,
    outputs: list[Tensor],
    inputs: list[list[Tensor]],
    group: Any,
    op: Any,
    async_op: bool = True,
    timeout: int = -1,
) -> Any:
    _one(call, outputs, "c10d::reduce_scatter_")
    ranks, reduction = call.group(group, outputs, op)
    if ranks is None:
        return None
    if any(part.shape != outputs[0].shape or part.dtype != outputs[0].dtype for part in inputs[0]):
        raise RefusedError(message("c10d::reduce_scatter_", "slices of several shapes or dtypes: pad them to one"))
    ranks.reduce_scatter(outputs[0], torch.stack(inputs[0]), reduction)
    return outputs, _done(outputs, async_op)


def _reduce_scatter_base(
    call: _Call, output: Tensor, whole: Tensor, group: Any, op: Any, async_op: bool = True, timeout: int = -1
) -> Any:
    ranks, reduction = call.group(group, [output], op)
    if ranks is None:
        return None
    _same_count("c10d::_reduce_scatter_base_", whole, output, ranks.size)
    ranks.reduce_scatter(output, whole, reduction)
    return output, _done([output], async_op)


def _reduce_scatter_coalesced(
    call: _Call,
    outputs: list[Tensor],
    inputs: list[Tensor],
    group: Any,
    op: Any,
    async_op: bool = True,
    timeout: int = -1,
) -> Any:
    ranks, reduction = call.group(group, outputs, op)
    if ranks is None:
        return None
    for output, whole in zip(outputs, inputs, strict=True):
        _same_count("c10d::reduce_scatter_tensor_coalesced_", whole, output, ranks.size)
        ranks.reduce_scatter(output, whole, reduction)
    return _done(outputs, async_op)


def _allgather(
    call: _Call, outputs: list[list[Tensor]], inputs: list[Tensor], group: Any, async_op: bool = True, timeout: int = -1
) -> Any:
    work = _allgather_lists(call, outputs, inputs, group, async_op)
    return None if work is None else (outputs, work)


def _allgather_lists(
    call: _Call, outputs: list[list[Tensor]], inputs: list[Tensor], group: Any, async_op: bool = True, timeout: int = -1
) -> Any:
    ranks, _ = call.group(group, inputs)
    uneven = any(
        out.shape != own.shape or out.dtype != own.dtype for outs, own in _lists(outputs, inputs) for out in outs
    )
    if ranks is None or uneven:
        return None  # the backend knows what it does with those: a copy is a copy
    for outs, own in _lists(outputs, inputs):
        for out, part in zip(outs, ranks.all_gather(own), strict=True):
            out.detach().copy_(part)
    return _done([out for outs in outputs for out in outs], async_op)


def _lists(outputs: list[list[Tensor]], inputs: list[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    return list(zip(outputs, inputs, strict=True))


def _allgather_base(
    call: _Call, output: Tensor, own: Tensor, group: Any, async_op: bool = True, timeout: int = -1
) -> Any:
    ranks, _ = call.group(group, [own])
    if ranks is None:
        return None
    _same_count("c10d::_allgather_base_", output, own, ranks.size)
    ranks.gather_into(output, own)
    return output, _done([output], async_op)


def _allgather_coalesced(
    call: _Call, outputs: list[Tensor], inputs: list[Tensor], group: Any, async_op: bool = True, timeout: int = -1
) -> Any:
    ranks, _ = call.group(group, inputs)
    if ranks is None:
        return None
    for output, own in zip(outputs, inputs, strict=True):
        _same_count("c10d::allgather_into_tensor_coalesced_", output, own, ranks.size)
        ranks.gather_into(output, own)
    return _done(outputs, async_op)


def _same_count(what: str, whole: Tensor, share: Tensor, size: int) -> None:
    if whole.numel() != share.numel() * size or whole.dtype != share.dtype:
        raise RefusedError(
            message(what, f"{dtype_name(whole.dtype)} {list(whole.shape)} is not {size} of {list(share.shape)}: pad it")
        )


def _done(value: list[Tensor], async_op: bool) -> Any:
    """A Work that is complete; its future holds ``value`` where the caller keeps it."""
    if not async_op and _done_already:
        return _done_already[0]
    future: Any = torch.futures.Future()
    future.set_result(value if async_op else [])
    # Made of a future in C++: torch drops the Python part of a Work made in Python, whose wait would never end.
    work = _c10d._create_work_from_future(future).boxed()
    if not async_op:
        _done_already.append(work)
    return work


_done_already: list[Any] = []
"""The Work of calls that wait for it at once and never look into it."""

_RUN: dict[str, Callable[..., Any]] = {
    "c10d::allreduce_": _allreduce,
    "c10d::allreduce_coalesced_": _allreduce_coalesced,
    "c10d::reduce_": _reduce,
    "c10d::reduce_scatter_": _reduce_scatter,
    "c10d::_reduce_scatter_base_": _reduce_scatter_base,
    "c10d::reduce_scatter_tensor_coalesced_": _reduce_scatter_coalesced,
    "c10d::allgather_": _allgather,
    "c10d::_allgather_base_": _allgather_base,
    "c10d::allgather_into_tensor_coalesced_": _allgather_coalesced,
    "c10d::allgather_coalesced_": _allgather_lists,
}
