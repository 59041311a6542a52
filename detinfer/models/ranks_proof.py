"""The proof of all_reduce between these ranks, on their CPUs or GPUs: every path against the reference, before a model uses one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from detinfer import native
from detinfer.collectives import patterns
from detinfer.collectives.calls import PATHS, Order
from detinfer.collectives.cuda_paths import KNOWN
from detinfer.ops.evidence import REFERENCE_NAME, WIDTHS, Evidence, from_bits
from detinfer.reference.all_reduce import all_reduce
from detinfer.reference.all_reduce_rms_norm import all_reduce_rms_norm as reference
from detinfer.reference.arithmetic import Bits, load, store

SUBJECT, FUSED = "detinfer::all_reduce", "detinfer::all_reduce_rms_norm"
"""The names of the operations in decisions."""

CPU = torch.device("cpu")


def _ways(collective: str, device: torch.device) -> tuple[Any, ...]:
    return KNOWN[collective] if device.type == "cuda" else PATHS[collective]


def prove(ranks: Any, dtype: torch.dtype, order: Order = "rank_order", device: torch.device = CPU) -> tuple[int, bytes]:
    """Compare all_reduce, in an order of ranks, with detinfer/reference/all_reduce.py on this rank: (results, their bytes).

    All ranks call it together; ``ranks`` is the communicator of ``device``. Inputs cancel, have signed zeros, NaN and
    infinities, and odd widths. Raises Diverged with the first difference, UnsupportedDtype for a dtype without an order here.
    """
    native.dtype_code(dtype, SUBJECT)
    evidence, name, size = Evidence(SUBJECT, dtype), REFERENCE_NAME[dtype], ranks.size
    rng = np.random.default_rng(size)
    inputs: dict[str, list[Bits]] = {
        f"width {width}": patterns.cancellation(rng, size, (width,), name) for width in WIDTHS if size > 1
    }
    inputs["signed zeros"] = patterns.zeros(size, name)
    inputs["special values"] = patterns.special(rng, size, (777,), name)
    for where, parts in inputs.items():
        wanted = from_bits(all_reduce(parts, name, "sum", order), dtype)
        mine = from_bits(parts[ranks.rank], dtype).to(device)
        for path in _ways("all_reduce", device):
            got = ranks.all_reduce(mine, path=path, order=order).cpu()
            evidence.expect(got, wanted, f"{where}, {size} ranks, rank {ranks.rank}, {path}")
    return evidence.total()


def prove_fused(ranks: Any, dtype: torch.dtype, device: torch.device = CPU) -> tuple[int, bytes]:
    """Compare all_reduce_rms_norm (mode R, weight mode fp32) with its reference on this rank, as ``prove`` does."""
    native.dtype_code(dtype, FUSED)
    evidence, name, size, eps = Evidence(FUSED, dtype), REFERENCE_NAME[dtype], ranks.size, 1e-5
    rng = np.random.default_rng([size, 1])
    for width in WIDTHS:
        parts = patterns.cancellation(rng, size, (3, width), name)
        residual, weight = (
            store(rng.integers(-512, 512, shape).astype(np.float32) / np.float32(64), name)
            for shape in ((3, width), (width,))
        )
        norm, total = reference(parts, residual, load(weight, name), eps, name, weight_mode="fp32")
        mine = [from_bits(part, dtype).to(device) for part in (parts[ranks.rank], residual, weight)]
        for path in _ways("all_reduce_rms_norm", device):
            got = ranks.all_reduce_rms_norm(mine[0], mine[1], mine[2], eps, weight_mode="fp32", path=path)
            where = f"width {width}, {size} ranks, rank {ranks.rank}, {path}"
            evidence.expect(got[0].cpu(), from_bits(norm, dtype), f"{where}, the norm")
            evidence.expect(got[1].cpu(), from_bits(total, dtype), f"{where}, the sum")
    return evidence.total()
