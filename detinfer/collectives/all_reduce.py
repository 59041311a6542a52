"""all_reduce: what may be reduced, by which path, and the call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from detinfer.collectives.calls import OPS, ORDERS, PATH_NUMBERS, REDUCED, Call, Path, reduction, steering
from detinfer.errors import UsageError

if TYPE_CHECKING:
    from detinfer.collectives.communicator import Communicator


def one_stage_bytes(size: int) -> int:
    """Up to here ``1stage`` is the faster path between ``size`` ranks, as measured on two cores: it meets once less."""
    return 1 << 17 if size == 2 else 1 << 14


def on_cpu(where: str, **tensors: torch.Tensor | None) -> None:
    """Raise UsageError for a tensor that has no dense elements in this process's memory."""
    for name, tensor in tensors.items():
        if tensor is not None and not (tensor.is_cpu and tensor.layout is torch.strided):
            raise UsageError(f"{where}: {name} is on {tensor.device}, {tensor.layout}; it has to be dense, on cpu")


def path_number(path: Path | None, nbytes: int, size: int) -> int:
    """csrc's number of ``path``, or of the faster one for a tensor of ``nbytes``: its bits are the same."""
    if path is None:
        path = "1stage" if nbytes <= one_stage_bytes(size) else "2stage"
    return PATH_NUMBERS[path]


def place(where: str, tensor: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(contiguous input, contiguous tensor to write): ``out`` where that can be written as it is.

    The two are one memory or share none.
    """
    given = tensor if tensor.is_contiguous() else tensor.contiguous()
    if out is None:
        return given, torch.empty(tensor.shape, dtype=tensor.dtype)
    if out is given:
        return given, out
    if out.shape != tensor.shape or out.dtype != tensor.dtype:
        raise UsageError(
            f"{where}: out is {out.dtype} {list(out.shape)}, the tensor {tensor.dtype} {list(tensor.shape)}; they have to agree"
        )
    if not out.is_contiguous():
        return given, torch.empty(tensor.shape, dtype=tensor.dtype)
    apart = abs(given.data_ptr() - out.data_ptr())
    if 0 < apart < given.numel() * given.element_size():
        given = given.clone()
    return given, out


def all_reduce(
    ranks: Communicator, tensor: torch.Tensor, op: str, order: str, path: Path | None, out: torch.Tensor | None
) -> torch.Tensor:
    """See ``Communicator.all_reduce``."""

    def fill(call: Call) -> None:
        reduction("all_reduce", dtype, op, order, path)
        call.dtype, call.item, call.count = REDUCED[dtype], tensor.element_size(), count
        call.op, call.order = OPS[op], ORDERS[order]
        call.path = path_number(path, count * call.item, ranks.size)

    on_cpu("all_reduce", tensor=tensor, out=out)
    path = path or steering()
    dtype, count = tensor.dtype, tensor.numel()
    given, written = place("all_reduce", tensor, out)
    with ranks._lock:
        args = ranks.prepare(("all_reduce", dtype, count, op, order, path), fill)
        args.in_, args.out = given.data_ptr(), written.data_ptr()
        ranks.finish(args)
    if out is None:
        return written
    if out is not written:
        out.copy_(written)
    return out
