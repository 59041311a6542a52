"""reduce_scatter: a rank's slice of all_reduce, without the others' slices being summed for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from detinfer.collectives.all_reduce import on_cpu
from detinfer.collectives.calls import OPS, ORDERS, REDUCED, Call, Path, reduction
from detinfer.errors import UsageError

if TYPE_CHECKING:
    from detinfer.collectives.communicator import Communicator


def dimension(where: str, tensor: torch.Tensor, dim: int) -> int:
    """``dim`` counted from 0, or UsageError."""
    if not -tensor.dim() <= dim < tensor.dim():
        raise UsageError(f"{where}: there is no dimension {dim} in a tensor of shape {list(tensor.shape)}")
    return dim % tensor.dim()


def reduce_scatter(
    ranks: Communicator, tensor: torch.Tensor, dim: int, op: str, order: str, path: Path | None
) -> torch.Tensor:
    """See ``Communicator.reduce_scatter``."""

    def fill(call: Call) -> None:
        call.dtype, call.item, call.count = REDUCED[dtype], tensor.element_size(), count
        call.op, call.order, call.dim = OPS[op], ORDERS[order], dim

    dtype, count = tensor.dtype, tensor.numel()
    reduction("reduce_scatter", dtype, op, order, path)
    on_cpu("reduce_scatter", tensor=tensor)
    dim = dimension("reduce_scatter", tensor, dim)
    if tensor.shape[dim] % ranks.size:
        raise UsageError(
            f"reduce_scatter: dimension {dim} of size {tensor.shape[dim]} has no {ranks.size} equal slices"
        )
    given = tensor.movedim(dim, 0).contiguous()
    out = torch.empty([given.shape[0] // ranks.size, *given.shape[1:]], dtype=dtype)
    with ranks._lock:
        args = ranks.prepare(("reduce_scatter", dtype, count, op, order, dim), fill)
        args.in_, args.out = given.data_ptr(), out.data_ptr()
        ranks.finish(args)
    return out.movedim(0, dim).contiguous()
