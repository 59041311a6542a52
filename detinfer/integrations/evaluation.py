"""Run an evaluation in this process with its model wrapped, once or several times, and add up what was found."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detinfer.errors import EXIT_DIVERGED, EXIT_SAME, EXIT_VACUOUS, UsageError
from detinfer.integrations.enforced import Account, Terms, keeping_accounts
from detinfer.integrations.replay import MOST_NAMED, Divergence, shown

LIBRARIES = {"lm_eval": "lm_eval", "inspect": "inspect_ai", "lighteval": "lighteval"}
"""Programs whose evaluations can be wrapped, and the packages that they are of; ``<package>_run`` here runs each."""


@dataclass
class Outcome:
    """Each run's account, and where later runs differ from the first."""

    command: list[str]
    harness_exit_code: int = EXIT_SAME
    runs: list[dict[str, Any]] = field(default_factory=list)
    repeats: list[Divergence] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where anything diverged, the harness's own code where it failed, 5 where nothing could have diverged."""
        verdicts = {run["verdict"] for run in self.runs}
        if self.repeats or "diverged" in verdicts:
            return EXIT_DIVERGED
        if self.harness_exit_code:
            return self.harness_exit_code
        return EXIT_VACUOUS if "vacuous" in verdicts or not self.runs else EXIT_SAME

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": 1,
            "exit_code": self.exit_code,
            "command": self.command,
            "harness_exit_code": self.harness_exit_code,
            "runs": self.runs,
            "repeats": [vars(one) for one in self.repeats],
        }

    def lines(self) -> Iterator[str]:
        """The summary, for a terminal."""
        for number, run in enumerate(self.runs, 1):
            held = run["policy"]
            under = "no policy" if held == "off" else f"scope {held['scope']}, uncovered {held['uncovered']}"
            marked = run["system_fingerprint"]
            yield f"detinfer eval: run {number} of {len(self.runs)} ({under}){', ' + marked['fingerprint'] if marked else ''}"
            if held != "off" and not run["operations"]["accepted"] and held["uncovered"] == "refuse":
                yield "  no operation of the model ran in this process: the policy was not in force where it runs"
            for op in run["operations"]["allowed"]:
                yield f"  allowed   {op}, unproved"
            for kind, report in run["replay"].items():
                yield (
                    f"  {report['verdict']:<9} {kind}: {report['replayed']} of {report['asked']} requests asked again, "
                    f"{report['changed']} in other batches, {report['compared']} answers compared, "
                    f"{report['diverged']} differ" + (f", {report['drawn']} drawn at random" if report["drawn"] else "")
                )
                for one in report["divergences"]:
                    yield f"  diverged  {one['question']}, {one['how']}: {one['got']}, at first {one['expected']}"
                if report["verdict"] == "vacuous":
                    yield f"            {_why_vacuous(report)}"
            if not run["replay"]:
                yield "  vacuous   no request reached the model"
            yield f"  results   {run['digests']['results'][:16]}, task {run['digests']['task'][:16]}"
        if not self.runs:
            yield "detinfer eval: vacuous, no request reached the model"
        for one in self.repeats:
            yield f"  diverged  {one.question}, {one.how}: {one.got}, in run 1 {one.expected}"
        if self.exit_code:
            yield f"exit code {self.exit_code}"


def _why_vacuous(report: dict[str, Any]) -> str:
    if report["drawn"] == report["asked"]:
        return "every answer is drawn at random: nothing to compare (set do_sample to false)"
    if report["unobserved"]:
        return "the model's batches cannot be seen from this process; --unobserved accept takes its answers as they are"
    return "no request was seen in another batch than at first: give more documents"


def run(command: Sequence[str], terms: Terms, repeat: int = 1) -> Outcome:
    """Run ``command`` (``lm_eval run ...``, ``inspect eval ...``, ``lighteval ...``) ``repeat`` times on these terms.

    Raises UsageError for a command that is none of these, TargetError where the library itself fails.
    """
    if repeat < 1:
        raise UsageError(f"--repeat {repeat}: at least 1")
    package, words = _words(command)
    execute = importlib.import_module(f"detinfer.integrations.{package}_run").execute
    outcome = Outcome(list(command))
    first: dict[str, tuple[str, Any]] = {}
    for number in range(1, repeat + 1):
        with keeping_accounts(terms) as made:
            outcome.harness_exit_code = execute(words, terms)
        for account in made:
            outcome.runs.append(account.to_json())
            first = first or account.answers
            outcome.repeats += list(_differences(first, account, number))[: MOST_NAMED - len(outcome.repeats)]
        if outcome.harness_exit_code:
            break
    return outcome


def _differences(first: dict[str, tuple[str, Any]], account: Account, number: int) -> Iterator[Divergence]:
    later = account.answers
    for name in dict.fromkeys((*first, *later)):
        one, other = first.get(name), later.get(name)
        if one is None or other is None or not account.equal(one[1], other[1]):
            yield Divergence(name, f"in run {number}", shown(one and one[1]), shown(other and other[1]))


def _words(command: Sequence[str]) -> tuple[str, list[str]]:
    """The package that a command is of, and what its program is given."""
    words = list(command)
    if len(words) > 2 and Path(words[0]).name.startswith("python") and words[1] == "-m":
        words = words[2:]
    program = Path(words[0]).name.replace("-", "_").removesuffix("_ai") if words else ""
    if program not in LIBRARIES:
        raise UsageError(
            f"{shlex.join(command)}: a command of lm-evaluation-harness, Inspect or lighteval, as: lm_eval run --model hf ..., "
            "inspect eval task.py --model hf/..., lighteval accelerate model_name=... TASKS"
        )
    return LIBRARIES[program], words[1:]
