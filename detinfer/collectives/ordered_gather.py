"""The ordered sum of parts that were gathered before: the contract's bytes over any backend and between any hosts.

Every operation here is torch's own and rounds once per element, or moves bytes, so that it runs on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detinfer.collectives.calls import reduction

_NAN = {
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF),
}
"""The canonical NaN's bits, and the integers that hold them."""


def reduce_gathered(parts: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """``parts[r]``, rank r's tensor, reduced in ``rank_order``; all of one shape, dtype and device.

    ``op`` is sum, avg, max or min, of the dtypes of ``Communicator.all_reduce``, with its bytes. Raises UsageError or
    UnsupportedDtype for what has no canonical order.
    """
    dtype = parts[0].dtype
    reduction("all_reduce", dtype, op, "rank_order", None)
    if len(parts) == 1:
        return parts[0].clone()
    if op in ("max", "min"):
        found = parts[0]
        for part in parts[1:]:
            found = _extreme(found, part, op == "max")
        return canonical_nan(found)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    if op == "avg":
        total = total / len(parts)
    return canonical_nan(total.to(dtype))


def _extreme(a: torch.Tensor, b: torch.Tensor, greatest: bool) -> torch.Tensor:
    # NaN wins, +0 > -0: torch.maximum takes either zero.
    better = b > a if greatest else b < a
    if a.is_floating_point():
        zeros = (a == 0) & (b == 0) & (torch.signbit(a) if greatest else torch.signbit(b))
        better = (better | zeros | torch.isnan(b)) & ~torch.isnan(a)
    return torch.where(better, b, a)


def canonical_nan(result: torch.Tensor) -> torch.Tensor:
    """``result`` with the contract's NaN in the place of any other, float32, bfloat16, float16 and float64 alike."""
    if result.dtype not in _NAN:
        return result
    integers, bits = _NAN[result.dtype]
    return torch.where(torch.isnan(result), bits, result.view(integers)).view(result.dtype)
