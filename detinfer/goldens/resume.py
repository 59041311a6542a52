"""A verification that was interrupted: what is saved of it, and whether it may be gone on with here."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from detinfer import environment
from detinfer.errors import GoldenError, InfrastructureError
from detinfer.goldens.format import Golden
from detinfer.goldens.inputs import Options
from detinfer.goldens.ledger import Ledger
from detinfer.goldens.result import Result, Verdict

BESIDE = ("detinfer", "native")
"""Fields of the environment that make no golden stale, and yet must be the same in both halves of one run."""


class Interrupted(KeyboardInterrupt):
    """A verification was stopped; ``result`` holds what it found, to be saved and resumed."""

    def __init__(self, result: Result) -> None:
        super().__init__("interrupted")
        self.result = result


class Broken(InfrastructureError):
    """A process that took part died; ``result`` holds what was found, to be saved and resumed."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


def unfinished(result: Result, golden: Golden, options: Options, alone: str, ledger: Ledger, wanted: int) -> Result:
    """``result`` with all that is needed to go on: what the ``ledger`` holds of the ``wanted`` trials and cases."""
    before, counted, differing = ledger.counts()
    verdict: Verdict = "diverged" if differing else "not_run"
    reason = f"interrupted after {before} of {wanted} trials and cases: detinfer verify --resume goes on"
    saved = {"golden": golden.manifest.digest, "options": asdict(options), "alone": alone, **ledger.to_json()}
    return replace(
        result,
        invariance=replace(
            result.invariance, verdict=verdict, rows_compared=counted, rows_differing=differing, reasons=[reason]
        ),
        unfinished=saved,
    )


def options_of(held: dict[str, Any]) -> Options:
    """The options that an interrupted run was started with."""
    given = dict(held["unfinished"]["options"])
    for name in ("batch_sizes", "axes"):
        given[name] = None if given[name] is None else tuple(given[name])
    return Options(**given)


def check(
    held: dict[str, Any],
    file: Path,
    golden: Golden,
    policy: dict[str, Any],
    here: environment.Environment,
    ranks: int = 1,
) -> None:
    """GoldenError, with the reason, unless an interrupted run may be gone on with here: golden, ranks, policy, environment."""

    def refuse(why: str) -> GoldenError:
        return GoldenError(f"--resume {file}: {why}; start again without --resume")

    if (recorded := held["unfinished"]["golden"]) != golden.manifest.digest:
        raise refuse(
            f"the run was of another golden ({recorded[:12]}) than {golden.path} ({golden.manifest.digest[:12]})"
        )
    if (size := 1 + len(held["unfinished"].get("others", []))) != ranks:
        many = f"{size} ranks; give --tp {size}" if size > 1 else "1 rank; give --tp 1"
        raise GoldenError(f"--resume {file}: this run is on {ranks}, the interrupted one was on {many}")
    if held["policy"] != policy:
        names = sorted(name for name in {*held["policy"], *policy} if held["policy"].get(name) != policy.get(name))
        raise refuse(f"the run was under another policy: {', '.join(names)}")
    then = environment.Environment.from_json(held["environment"], f"{file}: environment")
    differs = [f"{name} was {a}, is {b}" for name, a, b in environment.differences(then, here)]
    differs += [
        f"{name} was {getattr(then, name)}, is {getattr(here, name)}"
        for name in BESIDE
        if getattr(then, name) != getattr(here, name)
    ]
    if differs:
        raise refuse(f"the run was in another environment: {'; '.join(differs)}")


def check_alone(held: dict[str, Any], alone: str) -> None:
    """GoldenError where the model gives other bytes alone than it gave in the run that is resumed."""
    before = held["unfinished"]["alone"]
    if before and before != alone:
        raise GoldenError(
            "--resume: alone, the model gives other bytes now than in the run that is resumed: what was found then says "
            "nothing about this one. Start again without --resume"
        )
