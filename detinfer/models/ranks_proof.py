"""The proof of all_reduce between these ranks: every path against the reference, before a model uses one."""

from __future__ import annotations

import numpy as np
import torch

from detinfer import native
from detinfer.collectives import patterns
from detinfer.collectives.calls import PATHS
from detinfer.collectives.communicator import Communicator
from detinfer.ops.evidence import REFERENCE_NAME, WIDTHS, Evidence, from_bits
from detinfer.reference.all_reduce import all_reduce
from detinfer.reference.arithmetic import Bits

SUBJECT = "detinfer::all_reduce"
"""The name of the operation in decisions."""


def prove(ranks: Communicator, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare all_reduce, in rank order, with detinfer/reference/all_reduce.py on this rank: (results, their bytes).

    All ranks call it together. Inputs cancel, have signed zeros, NaN and infinities, and odd widths. Raises Diverged
    with the first difference, UnsupportedDtype for a dtype without an order here.
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
        wanted = from_bits(all_reduce(parts, name), dtype)
        mine = from_bits(parts[ranks.rank], dtype)
        for path in PATHS["all_reduce"]:
            got = ranks.all_reduce(mine, path=path)
            evidence.expect(got, wanted, f"{where}, {size} ranks, rank {ranks.rank}, {path}")
    return evidence.total()
