"""all_gather: a copy of bytes, of any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from detinfer.collectives.all_reduce import on_cpu
from detinfer.collectives.calls import COPIED, Call
from detinfer.collectives.reduce_scatter import dimension

if TYPE_CHECKING:
    from detinfer.collectives.communicator import Communicator


def all_gather(ranks: Communicator, tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """See ``Communicator.all_gather``."""

    def fill(call: Call) -> None:
        call.dtype, call.item, call.count, call.dim = COPIED[dtype], tensor.element_size(), count, dim

    dtype, count = tensor.dtype, tensor.numel()
    on_cpu("all_gather", tensor=tensor)
    dim = dimension("all_gather", tensor, dim)
    given = tensor.resolve_conj().resolve_neg().contiguous()
    out = torch.empty([ranks.size, *given.shape], dtype=dtype)
    with ranks._lock:
        args = ranks.prepare(("all_gather", dtype, count, dim), fill)
        args.in_, args.out = given.data_ptr(), out.data_ptr()
        ranks.finish(args)
    shape = list(given.shape)
    shape[dim] *= ranks.size
    return out.movedim(0, dim).reshape(shape)
