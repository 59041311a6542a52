"""A result as one HTML page: nothing from the network, no script, light and dark, read by keyboard and screen reader."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import detinfer
from detinfer.errors import InfrastructureError
from detinfer.goldens.result import Result
from detinfer.reporters import summary

LEVELS = 5
"""Shades of the heat map, by the share of a cell's rows that differ."""


def rendered(template: str, **values: Any) -> str:
    """A template of this package with ``values``; what is missing is an error, and text is escaped."""
    environment = Environment(
        loader=PackageLoader("detinfer.reporters"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(version=detinfer.__version__, **values)


def page(result: Result) -> str:
    """The page's text."""
    return rendered(
        "result.html",
        result=result,
        summary=summary,
        verdicts=summary.verdicts(result),
        causes=_causes(result),
        maps=_maps(result),
        histograms=_histograms(result),
        environment=_environment(result.environment),
        control_axes={axis.name: axis for axis in result.control.axes},
        golden=asdict(result.golden),
    )


def write(result: Result, path: Path) -> None:
    """Write the page; InfrastructureError when that cannot be done."""
    save(page(result), path)


def save(text: str, path: Path) -> None:
    """Write a page; InfrastructureError when that cannot be done."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InfrastructureError(f"--html {path}: {error.strerror}; the report was not written") from error


def _causes(result: Result) -> list[dict[str, Any]]:
    """The first divergence of each part, with its operation where it was located."""
    parts = (("First cause", result.invariance), ("Against the file", result.golden), ("Policy off", result.control))
    return [
        {"title": title, "first": part.first, "cause": getattr(part, "cause", None), "paths": _paths(result, part)}
        for title, part in parts
        if part.first is not None
    ]


def _paths(result: Result, part: Any) -> list[str]:
    """By which path the policy ran the operation of a first cause, and why; nothing where the policy was off."""
    cause = getattr(part, "cause", None)
    if cause is None or part is result.control:
        return []
    made = [one for one in result.decisions if one["op"].partition(".")[0] == cause.operation.partition(".")[0]]
    return [f"{one['path']} ({', '.join(one['dtypes'])}): {one['reason']}" for one in made]


def _maps(result: Result) -> list[dict[str, Any]]:
    """Heat maps, layer by trial, of the trials with the policy and without it; a map without a difference is left out."""
    found = []
    for title, tallies, trials in (
        ("Under the policy", result.invariance.units, result.invariance.trials),
        ("With the policy off", result.control.units, result.control.trials),
    ):
        layers = summary.layers(tallies)
        if not any(layer.trials for layer in layers):
            continue
        numbers = sorted({*range(trials), *(number for layer in layers for number in layer.trials)})
        most = max(count for layer in layers for count in layer.trials.values())
        rows = [
            (layer, [(count, _level(count, most)) for count in (layer.trials.get(number, 0) for number in numbers)])
            for layer in layers
        ]
        found.append({"title": title, "trials": numbers, "rows": rows})
    return found


def _level(count: int, most: int) -> int:
    return 0 if count == 0 else 1 + min(LEVELS - 1, count * LEVELS // (most + 1))


def _histograms(result: Result) -> list[dict[str, Any]]:
    found = []
    for title, tallies in (("Under the policy", result.invariance.units), ("Policy off", result.control.units)):
        counts = summary.ulps(tallies)
        if counts:
            most = max(count for _, count in counts)
            bars = [(distance, count, max(1, 100 * count // most)) for distance, count in counts]
            found.append({"title": title, "bars": bars})
    return found


def _environment(held: dict[str, Any]) -> list[tuple[str, str]]:
    """Fields of the environment as text, those with several entries as a line each."""
    found = []
    for name, value in held.items():
        if isinstance(value, dict):
            found += [(f"{name}.{key}", str(item)) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            found.append((name, ", ".join(map(str, value))))
        elif value not in (None, ""):
            found.append((name, str(value)))
    return found
