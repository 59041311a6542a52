"""A divergence of a saved result, made again on the golden that it was found with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detinfer.errors import GoldenError
from detinfer.goldens.cause.find import find
from detinfer.goldens.cause.locate import Located
from detinfer.goldens.format import Golden
from detinfer.goldens.inputs import Options, load_inputs, units_of
from detinfer.goldens.replay import replays
from detinfer.goldens.result import Divergence
from detinfer.goldens.runner import Request
from detinfer.models.ranks import ALONE, Ranks


def again(
    golden: Golden,
    target: Any,
    requests: Sequence[Request],
    first: Divergence,
    options: Options,
    ranks: Ranks = ALONE,
) -> Located | None:
    """The cause of ``first``; call it under the policy, or without one, that the divergence was found under.

    On several ranks all call it together, with the same ``first``. Raises GoldenError where the golden has no such unit.
    """
    chosen = [unit for unit in units_of(golden, ranks) if unit["name"] == first.unit]
    if first.kind != "model" and not ranks.any(bool(chosen)):
        raise GoldenError(f"{golden.path}: has no unit {first.unit}: the result is not of this golden")
    units = replays(target.module, chosen)
    load_inputs(golden, target, requests, units, chosen, ranks)
    return find(target, requests, units, options.trials(requests), first, options.seed, ranks)
