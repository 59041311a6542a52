"""Every decision that a policy makes about the operations that detinfer knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detinfer.policy import refusals
from detinfer.policy.copies import CAST, COPIES
from detinfer.policy.decide import decide
from detinfer.policy.families import Families, own
from detinfer.policy.policy import Decision, Policy


def explain(
    policy: Policy, dtypes: Sequence[torch.dtype] = refusals.DTYPES, *, families: Families | None = None
) -> list[Decision]:
    """What ``policy`` decides on ``dtypes`` for every operation that is covered, IEEE, a copy, allowed or known to be
    refused, in this order; makes every proof that has not been made yet (milliseconds each).

    A decision that is the same for all ``dtypes`` is listed once.
    """
    known = (families or own()).known
    computing = [*known.covered, *known.ieee]
    moving = sorted(COPIES - {CAST})
    rest = [op for op in (*policy.allow, *refusals.EXAMPLES) if op not in known.covered and op not in known.ieee]
    found: dict[tuple[str, Decision], Decision] = {}
    for op in dict.fromkeys((*computing, *moving, *rest)):
        for dtype in dtypes:
            decision = decide(policy, op, (dtype,), known)
            found.setdefault((op, decision), decision)
    return list(found.values())
