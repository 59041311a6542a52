"""Two recordings side by side: environment first, then inputs, then layers in the order of execution, then tokens.

They may come from two machines, two versions or two policies. A layer whose inputs agree and whose outputs do not is a
cause; one whose inputs differ already shows how far a difference has spread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from detinfer import bits, errors
from detinfer.environment import Environment
from detinfer.goldens.collect import phase
from detinfer.goldens.format import Golden
from detinfer.goldens.tree import Node, tensors

SCHEMA = 1
State = Literal["same", "cause", "spread", "missing"]


@dataclass
class Unit:
    """One unit: calls, rows compared and differing, distances, and how it stands.

    ``cause``: in some call the inputs are the same and the outputs are not. ``spread``: outputs differ, but only where
    inputs do. ``missing``: one recording alone has it, or calls it with other shapes.
    """

    name: str
    type: str
    state: State = "same"
    calls: int = 0
    rows_compared: int = 0
    rows_differing: int = 0
    ulps: dict[str, int] = field(default_factory=dict)
    first: str = ""


@dataclass
class Diff:
    """What two recordings differ in. ``tokens`` has, for each prompt whose tokens part, (prompt, step, both tokens)."""

    a: str
    b: str
    environment: list[tuple[str, str, str]]
    model: list[tuple[str, str, str]]
    policy: list[tuple[str, str, str]]
    inputs: list[str]
    units: list[Unit]
    first: str | None
    tokens: list[tuple[int, int, int, int]]
    logits: Unit
    schema: int = SCHEMA

    def same(self) -> bool:
        """Whether inputs, every unit, the results and the tokens agree; the environment may differ."""
        units = all(unit.state == "same" for unit in self.units)
        return units and self.logits.state == "same" and not (self.inputs or self.tokens)

    def exit_code(self) -> int:
        """0 when everything recorded agrees, 1 when bits differ."""
        return errors.EXIT_SAME if self.same() else errors.EXIT_DIVERGED

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "same": self.same()}


def diff(a: Golden, b: Golden) -> Diff:
    """Compare every call of every unit that both recordings have."""
    one, two = a.manifest, b.manifest
    environments = [Environment.from_json(manifest.environment) for manifest in (one, two)]
    theirs = {_name(unit): unit for unit in two.units}
    units = [_unit(a, b, unit, theirs.pop(_name(unit), None)) for unit in one.units if unit["skipped"] is None]
    units += [Unit(name, unit["type"], "missing") for name, unit in theirs.items() if unit["skipped"] is None]
    logits = Unit("", one.target["class"])
    for request, (left, right) in enumerate(zip(one.outputs["results"], two.outputs["results"], strict=False)):
        for step, (x, y) in enumerate(zip(left, right, strict=False)):
            _outputs(a, b, logits, x, y, f"request {request}, {phase(step)} step {step}")
    logits.state = "spread" if logits.rows_differing else "same"
    return Diff(
        a=str(a.path),
        b=str(b.path),
        environment=_fields(*environments),
        model=_pairs(one.target, two.target),
        policy=[*_pairs(one.policy, two.policy), *_decisions(one.decisions, two.decisions)],
        inputs=_inputs(one.inputs, two.inputs),
        units=units,
        first=next((unit.name for unit in units if unit.state == "cause"), None),
        tokens=list(_tokens(one.outputs["tokens"], two.outputs["tokens"])),
        logits=logits,
    )


def _name(unit: dict[str, Any]) -> str:
    return f"{unit['name']} (rank {unit['rank']})" if unit.get("rank") else str(unit["name"])


def _unit(a: Golden, b: Golden, left: dict[str, Any], right: dict[str, Any] | None) -> Unit:
    found = Unit(_name(left), left["type"])
    if right is None or right["skipped"] is not None:
        found.state = "missing"
        return found
    theirs = {(call["request"], call["step"]): call for call in right["calls"]}
    for call in left["calls"]:
        other = theirs.get((call["request"], call["step"]))
        if other is None:
            continue
        found.calls += 1
        where = f"request {call['request']}, {phase(call['step'])} step {call['step']}"
        if not _outputs(a, b, found, call["outputs"], other["outputs"], where):
            agree = call["arguments"] == other["arguments"]
            found.state = "cause" if agree or found.state == "cause" else "spread"
    if not found.calls:
        found.state = "missing"
    return found


@bits.unseen
def _outputs(a: Golden, b: Golden, found: Unit, left: Node, right: Node, where: str) -> bool:
    """Whether the tensors of two nodes agree; what differs is counted in ``found``."""
    pairs = list(zip(_digests(left), _digests(right), strict=False))
    same = left == right
    for (path, x), (_, y) in pairs:
        place = f"{where}, output {path}" if path else where
        one, two = a.row_digests(x), b.row_digests(y)
        if one.shape != two.shape or a.manifest.tensors[x]["shape"] != b.manifest.tensors[y]["shape"]:
            found.first = found.first or f"{place}: shapes {_shape(a, x)} and {_shape(b, y)}"
            continue
        wrong = (one != two).any(-1)
        found.rows_compared += len(one)
        found.rows_differing += int(wrong.sum())
        if x == y:
            continue
        values = a.tensor(x), b.tensor(y)
        if values[0] is None or values[1] is None or values[0].dtype != values[1].dtype:
            why = "no values are stored" if any(v is None for v in values) else "of another dtype"
            row = int(wrong.nonzero()[0]) if bool(wrong.any()) else 0
            found.first = found.first or f"{place}: row {row} ({why})"
            continue
        if bits.has_ulp(values[0].dtype):
            found.ulps = dict(Counter(found.ulps) + Counter(bits.ulp_histogram(values[0], values[1])))
        found.first = found.first or f"{place}: {bits.first_mismatch(values[1], values[0])}"
    return same


def _shape(golden: Golden, digest: str) -> str:
    return str(golden.manifest.tensors[digest]["shape"])


def _digests(node: Node) -> Iterator[tuple[str, str]]:
    found: Iterator[tuple[str, Any]] = tensors(node)
    yield from found


def _fields(a: Environment, b: Environment) -> list[tuple[str, str, str]]:
    """Every field that differs, also one that makes no golden stale."""
    found: list[tuple[str, str, str]] = []
    for name, value in a.to_json().items():
        other = b.to_json()[name]
        if isinstance(value, dict):
            keys = sorted(value.keys() | other.keys())
            found += [
                (f"{name}.{key}", str(value.get(key, "unset")), str(other.get(key, "unset")))
                for key in keys
                if value.get(key) != other.get(key)
            ]
        elif value != other:
            found.append((name, _text(value), _text(other)))
    return found


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _pairs(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    keys = sorted(a.keys() | b.keys())
    return [(key, _text(a.get(key)), _text(b.get(key))) for key in keys if a.get(key) != b.get(key)]


def _decisions(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Operations that took another path."""
    paths = [{(one["op"], *one["dtypes"]): one["path"] for one in side} for side in (a, b)]
    return [
        (" ".join(key), paths[0].get(key, "did not run"), paths[1].get(key, "did not run"))
        for key in dict.fromkeys([*paths[0], *paths[1]])
        if paths[0].get(key) != paths[1].get(key)
    ]


def _inputs(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    if a["digest"] == b["digest"]:
        return []
    found = []
    if len(a["prompts"]) != len(b["prompts"]):
        found.append(f"{len(a['prompts'])} and {len(b['prompts'])} prompts")
    for number, (x, y) in enumerate(zip(a["prompts"], b["prompts"], strict=False)):
        if x["tokens"] != y["tokens"]:
            found.append(f"prompt {number}: other tokens")
    if a["decode_steps"] != b["decode_steps"]:
        found.append(f"{a['decode_steps']} and {b['decode_steps']} decode steps")
    if a["requests"] != b["requests"]:
        found.append("the module's requests are others")
    return found


def _tokens(a: list[list[int]], b: list[list[int]]) -> Iterator[tuple[int, int, int, int]]:
    for prompt, (x, y) in enumerate(zip(a, b, strict=False)):
        step = next((i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), None)
        if step is not None:
            yield prompt, step, x[step], y[step]
