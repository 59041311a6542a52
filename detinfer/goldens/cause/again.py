"""A divergence of a saved result, made again on the golden that it was found with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detinfer.errors import GoldenError
from detinfer.goldens.cause.find import find
from detinfer.goldens.cause.locate import Located
from detinfer.goldens.format import Golden
from detinfer.goldens.inputs import Options, load_inputs
from detinfer.goldens.replay import replays
from detinfer.goldens.result import Divergence
from detinfer.goldens.runner import Request
from detinfer.models.ranks import ALONE


def again(
    golden: Golden, target: Any, requests: Sequence[Request], first: Divergence, options: Options
) -> Located | None:
    """The cause of ``first``; call it under the policy, or without one, that the divergence was found under.

    Raises GoldenError where the golden has no such unit, or was recorded on several ranks.
    """
    if golden.manifest.ranks > 1:
        raise GoldenError(
            f"{golden.path}: recorded on {golden.manifest.ranks} ranks: operations are located on one alone"
        )
    chosen = [unit for unit in golden.manifest.units if unit["name"] == first.unit]
    if first.kind != "model" and not chosen:
        raise GoldenError(f"{golden.path}: has no unit {first.unit}: the result is not of this golden")
    units = replays(target.module, chosen)
    load_inputs(golden, target, requests, units, chosen, ALONE)
    return find(target, requests, units, options.trials(requests), first, options.seed)
