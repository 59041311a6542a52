"""What a golden is verified on: the options of a run, the model it belongs to, its requests and its units' arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from detinfer import bits
from detinfer.errors import GoldenError, UsageError
from detinfer.goldens import tree
from detinfer.goldens.axes import NAMES, SWEPT
from detinfer.goldens.capture import Call
from detinfer.goldens.collect import WHOLE, collect
from detinfer.goldens.format import Golden
from detinfer.goldens.replay import Replay, replays
from detinfer.goldens.runner import Request
from detinfer.goldens.sweep import Key, Trial, plan
from detinfer.goldens.tree import Node
from detinfer.goldens.units import pattern
from detinfer.models.ranks import Ranks
from detinfer.models.targets import device_of
from detinfer.policy import Policy


@dataclass(frozen=True)
class Options:
    """What to run: ``only_trial`` redoes one trial of the ``n_trials``, and that case of each of the ``axes``.

    ``tp`` is the number of ranks where it is another than the golden's.
    """

    n_trials: int = 50
    seed: int = 0
    layers: str | None = None
    batch_sizes: tuple[int, ...] | None = None
    control: bool = False
    fail_fast: bool = False
    only_trial: int | None = None
    axes: tuple[str, ...] = NAMES
    tp: int | None = None

    def __post_init__(self) -> None:
        if self.n_trials < 1:
            raise UsageError(f"--n-trials {self.n_trials}: at least one trial is needed to say anything")
        if self.batch_sizes is not None and (not self.batch_sizes or min(self.batch_sizes) < 1):
            raise UsageError(f"--batch-sizes {self.batch_sizes}: sizes of 1 and more")
        if self.only_trial is not None and self.only_trial < 0:
            raise UsageError(f"--only-trial {self.only_trial}: trials are counted from 0")

    def trials(self, requests: Sequence[Request]) -> list[Trial]:
        """The trials to run, in order; none where no axis is chosen that trials vary."""
        if not set(self.axes) & set(SWEPT):
            return []
        count = max(self.n_trials, (self.only_trial or 0) + 1)
        planned = plan(requests, count, self.seed, self.batch_sizes)
        return planned[: self.n_trials] if self.only_trial is None else [planned[self.only_trial]]

    def cases(self) -> list[int]:
        """The cases of each axis other than the trials': one for 25 trials."""
        return list(range(max(1, self.n_trials // 25))) if self.only_trial is None else [self.only_trial]

    def redo(self, path: str, unit: str, trial: int | None, axis: str | None = None) -> str:
        """The command that redoes one comparison."""
        parts = ["detinfer", "verify", path, "--seed", str(self.seed)]
        if self.tp is not None:
            parts += ["--tp", str(self.tp)]
        if axis is not None:
            parts += ["--axes", axis]
        if unit != WHOLE:
            parts += ["--layers", f"'^{unit.partition('#')[0].replace('.', chr(92) + '.')}$'"]
        if self.batch_sizes is not None:
            parts += ["--batch-sizes", ",".join(map(str, self.batch_sizes))]
        if trial is not None:
            parts += ["--only-trial", str(trial)]
        return " ".join(parts)


def reductions_of(manifest: Any) -> str:
    """How the layers of a golden's model were joined over ranks; those of older ones know one way alone."""
    found: str = manifest.policy.get("reductions", "merged")
    return found


def check_target(golden: Golden, target: Any, policy: Policy | None = None) -> None:
    """GoldenError unless the target is the model that the golden was recorded from.

    Under a ``policy`` of other reductions its layers are joined otherwise, of the same weights: the golden is stale then.
    """
    other = policy is not None and policy.reductions != reductions_of(golden.manifest)
    recorded = golden.manifest.target
    dtype = str(target.dtype).removeprefix("torch.")
    for what, now in (
        ("class", target.class_name),
        ("dtype", dtype),
        ("config_digest", target.config_digest),
        ("weights_digest", target.weights_digest),
    ):
        if recorded[what] != now and not (other and what == "config_digest"):
            raise GoldenError(
                f"{golden.path}: a golden of another model: its {what.replace('_', ' ')} is {recorded[what]}, that of "
                f"{target.spec} is {now}. Verify the model that it was recorded from, or record this one"
            )


def requests_of(golden: Golden, target: Any, module_requests: Sequence[Request]) -> list[Request]:
    """The recorded requests: prompts with the tokens chosen at each step, or what the module's factory gives."""
    manifest = golden.manifest
    if target.kind != "causal_lm":
        found = [tree.map_tensors(r.arguments, lambda _, t: bits.digest(t)) for r in module_requests if r.arguments]
        if found != manifest.inputs["requests"]:
            raise GoldenError(f"{golden.path}: the factory {target.spec} gives other requests than were recorded")
        return list(module_requests)
    steps = manifest.inputs["decode_steps"] + 1
    return [
        Request(tokens=tuple(prompt["tokens"]), follow=tuple(tokens), steps=steps)
        for prompt, tokens in zip(manifest.inputs["prompts"], manifest.outputs["tokens"], strict=True)
    ]


def units_of(golden: Golden, ranks: Ranks) -> list[dict[str, Any]]:
    """The units that this rank replays; of another number of ranks, the golden's rank 0 has those of every rank."""
    rank = ranks.rank if golden.manifest.ranks == ranks.size else 0
    return [unit for unit in golden.manifest.units if unit.get("rank", 0) == rank]


def chosen_units(
    golden: Golden, target: Any, policy: Policy, options: Options, ranks: Ranks
) -> tuple[list[Replay], list[dict[str, Any]], Any]:
    """The units to replay, their entries in the manifest, and the batch dimensions of the whole model's results.

    The whole model is left out (None) when layers are picked: the line that redoes one comparison redoes just that.
    """
    manifest = golden.manifest
    matches = pattern(options.layers).search
    own = units_of(golden, ranks)
    chosen = [unit for unit in own if matches(unit["name"]) is not None]
    if reductions_of(manifest) != policy.reductions:  # stale, and some layers are others: judge those that are here
        here = {name for name, _ in target.module.named_modules()}
        chosen = [unit for unit in chosen if unit["kind"] == "attention" or unit["name"] in here]
    if options.layers is not None and not chosen:
        raise UsageError(f"--layers {options.layers!r} matches none of the golden's {len(own)} units")
    whole = manifest.outputs["batch"]["outputs"] if options.layers is None else None
    return replays(target.module, chosen), chosen, whole


def load_inputs(
    golden: Golden,
    target: Any,
    requests: Sequence[Request],
    units: Sequence[Replay],
    chosen: Sequence[dict[str, Any]],
    ranks: Ranks,
) -> dict[tuple[str, Key], tuple[Node, Node]]:
    """Give every unit its recorded arguments: from the file, or by running the prompts alone where it has none.

    Returns the recomputed (arguments, outputs) by unit and call; empty when the file has everything.
    """
    by_name, device = {unit.name: unit for unit in units}, device_of(target.module)
    missing: list[tuple[Replay, Key]] = []
    for entry in chosen:
        unit = by_name.get(entry["name"])
        for call in entry["calls"] if unit is not None else ():
            assert unit is not None
            key = (call["request"], call["step"])
            if golden.manifest.ranks != ranks.size:  # the file has the shares of other ranks
                missing.append((unit, key))
                continue
            node = tree.map_tensors(call["arguments"], lambda _, digest: golden.tensor(digest))
            if all(tensor is not None for _, tensor in tree.tensors(node)):
                unit.arguments[key] = _on(device, node)
            else:
                missing.append((unit, key))
    # A rank may find all of its own in the file where another does not: tensors that are equal are stored once.
    names = {name for rank in ranks.share({unit.name.partition("#")[0] for unit, _ in missing}) for name in rank}
    if not names:
        return {}
    found = collect(target, requests, lambda name: name in names)
    recomputed: dict[tuple[str, Key], tuple[Node, Node]] = {}
    for unit, key in missing:
        call = found.calls[key].get(unit.name)
        if not isinstance(call, Call):
            raise GoldenError(f"{golden.path}: the model no longer calls {unit.name} at step {key[1]}")
        unit.arguments[key] = call.arguments
        recomputed[unit.name, key] = (call.arguments, call.outputs)
    for unit in units:  # in one order on all ranks, wherever an input came from
        unit.arguments = dict(sorted(unit.arguments.items()))
    return recomputed


def _on(device: torch.device, node: Node) -> Node:
    return tree.map_tensors(node, lambda _, tensor: tensor.to(device))
