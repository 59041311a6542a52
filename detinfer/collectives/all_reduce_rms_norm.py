"""all_reduce, the residual's addition and RMSNorm in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from detinfer import native
from detinfer.collectives.all_reduce import on_cpu, path_number
from detinfer.collectives.calls import MODES, ORDERS, WEIGHT_MODES, Call, Path, reduction, steering
from detinfer.errors import UsageError

if TYPE_CHECKING:
    from detinfer.collectives.communicator import Communicator


def all_reduce_rms_norm(
    ranks: Communicator,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    mode: str,
    weight_mode: str,
    order: str,
    path: Path | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``Communicator.all_reduce_rms_norm``."""

    def fill(call: Call) -> None:
        call.dtype, call.item, call.count = native.dtype_code(x.dtype, where), x.element_size(), x.numel()
        call.order, call.n, call.eps = ORDERS[order], n, eps
        call.path = path_number(path, call.count * call.item, ranks.size)
        call.mode, call.weight_mode = MODES[mode], WEIGHT_MODES[weight_mode]
        call.weight_dtype = -1 if weight is None else native.dtype_code(weight.dtype, f"{where}, its weight")

    where, path = "all_reduce_rms_norm", path or steering()
    native.dtype_code(x.dtype, where)
    reduction(where, x.dtype, "sum", order, path)
    on_cpu(where, x=x, residual=residual, weight=weight)
    if mode not in MODES or weight_mode not in WEIGHT_MODES:
        raise UsageError(f"{where}: mode {mode!r} is R or U, weight_mode {weight_mode!r} one of {list(WEIGHT_MODES)}")
    if residual.shape != x.shape or residual.dtype != x.dtype or x.dim() == 0:
        raise UsageError(
            f"{where}: residual is {residual.dtype} {list(residual.shape)}, x is {x.dtype} {list(x.shape)}; "
            "they have to agree and have at least one dimension"
        )
    n = x.shape[-1]
    if weight is not None and weight.numel() != n:
        raise UsageError(f"{where}: weight has {weight.numel()} elements, a row has {n}")
    given, added = x.contiguous(), residual.contiguous()
    factor = None if weight is None else weight.contiguous()
    norm, total = torch.empty_like(given), torch.empty_like(given)
    with ranks._lock:
        options = (order, path, eps, mode, weight_mode, None if weight is None else weight.dtype)
        args = ranks.prepare((where, x.dtype, x.numel(), n, *options), fill)
        args.in_, args.out = given.data_ptr(), norm.data_ptr()
        args.residual, args.residual_out = added.data_ptr(), total.data_ptr()
        args.weight = None if factor is None else factor.data_ptr()
        ranks.finish(args)
    return norm, total
