"""Show that a sweep over ranks could have failed: stress inputs for the sum over ranks, with a planted wrong order."""

from __future__ import annotations

import numpy as np
import torch

from detinfer import bits
from detinfer.collectives import patterns
from detinfer.goldens.compare import compare
from detinfer.goldens.result import Sensitivity
from detinfer.goldens.stress import BATCH
from detinfer.models.ranks import Ranks
from detinfer.models.ranks_proof import SUBJECT
from detinfer.ops.evidence import REFERENCE_NAME, from_bits


def probe_ranks(ranks: Ranks) -> list[Sensitivity]:
    """One probe for each dtype and width that the model added over ranks; all ranks call it together.

    Rows in a batch must equal rows alone. Then rank r is given what rank r + 1 had, which is the order begun at rank 1:
    it must be seen. Two ranks commute, so there nothing can be planted.
    """
    return [_probe(ranks, dtype, width) for dtype, width in ranks.reduced] if ranks.size > 1 else []


@bits.unseen
def _probe(ranks: Ranks, dtype: torch.dtype, width: int) -> Sensitivity:
    rng = np.random.default_rng(width)
    parts = [
        from_bits(part, dtype) for part in patterns.cancellation(rng, ranks.size, (BATCH, width), REFERENCE_NAME[dtype])
    ]
    mine, next_ = parts[ranks.rank], parts[(ranks.rank + 1) % ranks.size]
    together = ranks.sum_of(mine)
    rows = compare({"tensor": together}, {"tensor": torch.cat([ranks.sum_of(row[None]) for row in mine])})
    seen: bool | None = compare({"tensor": ranks.sum_of(next_)}, {"tensor": together}).differing > 0
    note = ""
    if ranks.size == 2:
        seen, note = None, "two ranks commute"
    found = ranks.share((seen, rows.differing == 0))
    return Sensitivity(
        SUBJECT,
        bits.dtype_name(dtype),
        f"{ranks.size} ranks, {width}",
        None if seen is None else all(one for one, _ in found),
        all(invariant for _, invariant in found),
        rows.compared,
        note,
    )
