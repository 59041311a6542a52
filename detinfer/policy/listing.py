"""Every decision that a policy makes about the operations that detinfer knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detinfer.policy import refusals
from detinfer.policy.copies import CAST, COPIES
from detinfer.policy.decide import Known, decide
from detinfer.policy.families import Families, own
from detinfer.policy.policy import Decision, Policy


def explain(
    policy: Policy, dtypes: Sequence[torch.dtype] = refusals.DTYPES, *, families: Families | None = None
) -> list[Decision]:
    """What ``policy`` decides on ``dtypes`` for every operation that is covered, IEEE, a copy, allowed or known to be
    refused, in this order; makes every proof that has not been made yet (milliseconds each). Operations on CPU first, then
    those on a GPU, if there is one.

    A decision that is the same for all ``dtypes`` is listed once.
    """
    known = (families or own()).known
    found = _explain(policy, dtypes, known)
    for device, there in known.elsewhere.items():
        if device != "cuda" or torch.cuda.is_available():
            found += _explain(policy, dtypes, there)
    return found


def _explain(policy: Policy, dtypes: Sequence[torch.dtype], known: Known) -> list[Decision]:
    computing = [op for op in (*known.covered, *known.ieee, *known.values) if op not in COPIES]
    rest = [op for op in (*policy.allow, *refusals.EXAMPLES) if op not in computing]
    found: dict[tuple[str, Decision], Decision] = {}
    for op in dict.fromkeys((*computing, CAST, *sorted(COPIES), *rest)):
        for dtype in dtypes:
            # The cast of integers to a dtype stands for all casts to it.
            decision = decide(policy, op, (torch.int64, dtype) if op == CAST else (dtype,), known)
            found.setdefault((op, decision), decision)
    return list(found.values())
