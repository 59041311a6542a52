"""Before a sum between GPUs is timed: inputs on which a wrong order shows, and the comparison with the written order."""

from __future__ import annotations

import torch
import torch.distributed as dist

from detinfer.collectives.cuda import CudaCommunicator
from detinfer.errors import Diverged, Vacuous

LEAST = 1024
"""Elements from which on a wrong order has to show."""


def cancelling(n: int, rank: int, ranks: int, device: str = "cuda") -> torch.Tensor:
    """bfloat16: rank 0 holds powers of two, the last rank nearly their negatives, those between small values."""
    shared = torch.Generator(device=device).manual_seed(1)
    own = torch.Generator(device=device).manual_seed(2 + rank)
    first, last = rank == 0, rank == ranks - 1
    kind = torch.int16
    if first or last:
        power = torch.randint(12, 15, (n,), generator=shared, dtype=kind, device=device)
        flip = torch.randint(0, 2, (n,), generator=shared, dtype=kind, device=device)
        lower, fraction = (1, 0x7E) if last and ranks == 2 else (0, 0)  # 1.98 / 2 as much: two ranks leave something
        bits = (power + (127 - lower)) << 7 | fraction
        flip = flip if first else 1 - flip
    else:
        power = torch.randint(-9, -3, (n,), generator=own, dtype=kind, device=device)
        flip = torch.randint(0, 2, (n,), generator=own, dtype=kind, device=device)
        bits = (power + 127) << 7 | torch.randint(0, 128, (n,), generator=own, dtype=kind, device=device)
    return (bits | flip * -0x8000).view(torch.bfloat16)


def _ordered(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype).view(torch.int16)


def check_sum(comm: CudaCommunicator, x: torch.Tensor, out: torch.Tensor, path: str | None = None) -> None:
    """Raise Diverged unless ``all_reduce`` leaves in ``out`` the bytes of the sum in rank order, rounded once.

    ``x`` is a part of ``cancelling``. Raises Vacuous where the sum from rank 1 on would have the same bytes.
    """
    out.fill_(-3.0)
    comm.all_reduce(x, out=out, path=path)
    torch.cuda.synchronize()
    comm.check()
    parts = [torch.empty_like(x) for _ in range(comm.size)]
    dist.all_gather(parts, x)
    compare(parts, out, f"all_reduce of {x.nbytes} bytes by {path or 'the chosen path'}, rank {comm.rank}")


def compare(parts: list[torch.Tensor], found: torch.Tensor, what: str) -> None:
    """Raise Diverged unless ``found`` is the sum of ``parts``, Vacuous where a wrong order would not show."""
    right = _ordered(parts)
    wrong = int((right != found.view(torch.int16)).sum())
    if wrong:
        raise Diverged(f"{what} of {len(parts)}: {wrong} elements have other bytes than the reference")
    if len(parts) > 2 and found.numel() >= LEAST and bool((_ordered(parts[1:] + parts[:1]) == right).all()):
        raise Vacuous(f"{what} of {len(parts)}: the sum from rank 1 on has the same bytes; nothing was checked")
