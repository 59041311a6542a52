"""``detinfer eval``: an evaluation under the policy, replayed; and two of them side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click

from detinfer.cli import options
from detinfer.errors import UsageError


class Default(click.Group):
    """A group whose first word may be left out: it is ``run`` then."""

    def named(self, words: list[str]) -> list[str]:
        """The words with the command's name."""
        return words if words and (words[0] in self.commands or words[0] in ("-h", "--help")) else ["run", *words]

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """As click does, once the name is there."""
        return super().parse_args(context, self.named(args))


@click.group("eval", cls=Default)
def evaluate() -> None:
    """Run an evaluation under the policy: detinfer eval -- lm_eval run ...; compare two of them."""


@evaluate.command("run", context_settings={"ignore_unknown_options": True})
@click.option(
    "--policy", metavar="SCOPE", help="Scope, in place of the configured one: batch or run; off: none at all."
)
@options.allow_option
@click.option(
    "--uncovered",
    type=click.Choice(["refuse", "trust"]),
    help="Operations that nothing covers: refuse them, or trust them [default: the project's].",
)
@click.option(
    "--sample", type=click.IntRange(min=1), default=16, show_default=True, help="Requests of a kind to replay."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which ones, and in which batches.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Runs, back to back.")
@click.option(
    "--unobserved",
    type=click.Choice(["vacuous", "accept"]),
    help="A model whose batches cannot be seen, in another process [default: vacuous].",
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write the summary as JSON.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(
    context: click.Context,
    policy: str | None,
    allow: tuple[str, ...],
    uncovered: str | None,
    sample: int,
    seed: int,
    repeat: int,
    unobserved: Literal["vacuous", "accept"] | None,
    report: Path | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND (lm_eval run, inspect eval, lighteval) with its model under the policy and a sample of requests replayed.

    Ends with 1 where an answer differs in another batch or in a later run (the results file is written all the same, and
    says so), 5 where no request was seen in another batch.
    """
    from detinfer.integrations.enforced import Terms
    from detinfer.integrations.evaluation import run as start

    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"--report {report}: there is no folder {report.parent}")
    terms = Terms(policy, uncovered, list(allow) or None, sample, seed, unobserved or "vacuous")
    outcome = start(command, terms, repeat)
    if report is not None:
        report.write_text(json.dumps(outcome.to_json(), indent=1) + "\n", encoding="utf-8")
    for line in outcome.lines():
        click.echo(line, err=True)
    context.exit(outcome.exit_code)


@evaluate.command("diff")
@click.argument("a", type=click.Path(exists=True, path_type=Path))
@click.argument("b", type=click.Path(exists=True, path_type=Path))
@click.pass_context
def diff(context: click.Context, a: Path, b: Path) -> None:
    """Compare two evaluations sample by sample: results files, samples files, or folders (their newest results).

    Exits with 0 when every sample has the same answers byte for byte, with 1 when not, with 5 when there is no sample.
    """
    from detinfer.integrations.lm_eval_results import Run, compare

    found = compare(Run.read(a), Run.read(b))
    for line in found.lines():
        click.echo(line)
    context.exit(found.exit_code)
