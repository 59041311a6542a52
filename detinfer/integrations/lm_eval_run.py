"""Run lm-evaluation-harness in this process with its model wrapped, once or several times, and add up what was found."""

from __future__ import annotations

import importlib
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detinfer.errors import EXIT_DIVERGED, EXIT_SAME, EXIT_USAGE, EXIT_VACUOUS, DetinferError, TargetError, UsageError
from detinfer.integrations import lm_eval
from detinfer.integrations.replay import MOST_NAMED, Divergence, as_bytes, shown

PROGRAMS = ("lm_eval", "lm-eval")


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


def run(command: Sequence[str], options: dict[str, Any], repeat: int = 1) -> Outcome:
    """Run ``command`` (``lm_eval run ...``) ``repeat`` times, its model wrapped with ``options`` of ``lm_eval.Enforced``.

    Raises UsageError for a command that is not one of the harness, TargetError where the harness itself fails.
    """
    words = _words(command)
    if repeat < 1:
        raise UsageError(f"--repeat {repeat}: at least 1")
    lm_eval.register()
    outcome = Outcome(list(command))
    first: dict[str, tuple[str, Any]] = {}
    for number in range(1, repeat + 1):
        with _keeping_account() as made:
            outcome.harness_exit_code = _execute(words, options)
        for model in made:
            outcome.runs.append(model.account())
            first = first or model.answers
            outcome.repeats += list(_differences(first, model.answers, number))[: MOST_NAMED - len(outcome.repeats)]
        if outcome.harness_exit_code:
            break
    return outcome


def _differences(
    first: dict[str, tuple[str, Any]], later: dict[str, tuple[str, Any]], number: int
) -> Iterator[Divergence]:
    for name in dict.fromkeys((*first, *later)):
        one, other = first.get(name), later.get(name)
        if one is None or other is None:
            yield Divergence(name, f"in run {number}", shown(one and one[1]), shown(other and other[1]))
        elif as_bytes(one[1]) != as_bytes(other[1]):
            yield Divergence(name, f"in run {number}", shown(one[1]), shown(other[1]))


def _words(command: Sequence[str]) -> list[str]:
    """What the harness is given: the command without its program."""
    words = list(command)
    if len(words) > 2 and Path(words[0]).name.startswith("python") and words[1:3] == ["-m", "lm_eval"]:
        return words[3:]
    if not words or Path(words[0]).name not in PROGRAMS:
        raise UsageError(f"{shlex.join(words)}: a command of lm-evaluation-harness, as: lm_eval run --model hf ...")
    return words[1:]


@contextmanager
def _keeping_account() -> Iterator[list[lm_eval.Enforced]]:
    made: list[lm_eval.Enforced] = []
    lm_eval.made = made
    try:
        yield made
    finally:
        lm_eval.made = None


def _execute(words: list[str], options: dict[str, Any]) -> int:
    """One run of the harness by its own command line; its exit code."""
    harness = importlib.import_module("lm_eval._cli").HarnessCLI()
    importlib.import_module("lm_eval.utils").setup_logging()
    before, sys.argv = sys.argv, ["lm_eval", *words]
    try:
        arguments = harness.parse_args()
        if arguments.command != "run":
            raise UsageError(f"lm_eval {arguments.command}: only lm_eval run asks a model anything")
        _wrap(arguments, options)
        harness.execute(arguments)
    except DetinferError:
        raise
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_USAGE if ended.code else EXIT_SAME
    except Exception as error:
        traceback.print_exc()
        raise TargetError(f"lm-evaluation-harness failed: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = before
    return EXIT_SAME


def _wrap(arguments: Any, options: dict[str, Any]) -> None:
    """The model of a command line, and of its configuration file, becomes the inner one."""
    config: dict[str, Any] = {}
    if arguments.config:
        config = importlib.import_module("lm_eval.config.evaluate_config").EvaluatorConfig.load_yaml_config(
            arguments.config
        )
    given = config.get("model_args") or {}
    if isinstance(given, str):
        given = importlib.import_module("lm_eval.utils").simple_parse_args_string(given)
    given = {**given, **(arguments.model_args or {})}
    model = arguments.model or config.get("model") or "hf"
    if model != "detinfer":
        given["inner"] = model
    arguments.model = "detinfer"
    arguments.model_args = given | {name: value for name, value in options.items() if value is not None}
