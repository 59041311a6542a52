"""``detinfer verify``: replay a golden and judge it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from detinfer.cli import kept, options, ranks, vectors
from detinfer.cli.opened import opened
from detinfer.errors import UsageError
from detinfer.policy.policy import Reductions

if TYPE_CHECKING:
    from detinfer.goldens.result import Result


def _sizes(_: object, __: object, value: str | None) -> tuple[int, ...] | None:
    if value is None or value == "auto":
        return None
    try:
        return tuple(int(size) for size in value.split(","))
    except ValueError as error:
        raise UsageError(f"--batch-sizes {value}: whole numbers with commas between them, or auto") from error


@click.command()
@click.argument("golden", type=options.golden_path, required=False)
@click.option("--n-trials", default=50, show_default=True, help="Batches to form and replay.")
@click.option("--seed", default=0, show_default=True, help="Seed of batch sizes and positions.")
@options.layers_option
@click.option(
    "--batch-sizes", callback=_sizes, metavar="1,2,...", help="Sizes to use in turn [default: 1 to 64, edges first]."
)
@click.option(
    "--control", is_flag=True, help="Also run half of the trials with the policy off and report what diverges."
)
@click.option("--fail-fast", is_flag=True, help="Stop at the first trial that diverges.")
@click.option("--only-trial", type=int, metavar="N", help="Redo trial N alone.")
@click.option(
    "--axes", "axis_names", metavar="NAME,...", help="What to vary: batch, left-padding, chunks, ... [default: all]."
)
@click.option("--target", "spec", metavar="TARGET", help="Where the model is now [default: where it was recorded].")
@options.device_option
@click.option("--tp", type=int, metavar="N", help="Ranks [default: as recorded; of vectors, all].")
@options.timeout_option
@options.reductions_option
@click.option("--jobs", type=int, metavar="N", help="Share the trials over N processes, or over those of torchrun.")
@click.option(
    "--resume",
    "resume_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Go on with an interrupted run, from the file that it left.",
)
@click.option("--pending", "keep", is_flag=True, help="Record a golden that changed again, beside it, to be accepted.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
@click.option("--html", "html_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a page for people.")
@click.option("--junit-xml", "junit_file", type=click.Path(dir_okay=False, path_type=Path), help="Write JUnit XML.")
@click.option("--github", is_flag=True, help="Print annotations of GitHub Actions and add to the job's summary.")
@click.pass_context
def verify(
    context: click.Context,
    golden: Path | None,
    n_trials: int,
    seed: int,
    layers: str | None,
    batch_sizes: tuple[int, ...] | None,
    control: bool,
    fail_fast: bool,
    only_trial: int | None,
    axis_names: str | None,
    spec: str | None,
    device: str | None,
    tp: int | None,
    rank_timeout: float | None,
    reductions: Reductions | None,
    jobs: int | None,
    resume_file: Path | None,
    keep: bool,
    json_file: Path | None,
    html_file: Path | None,
    junit_file: Path | None,
    github: bool,
) -> None:
    """Replay every recorded layer and the whole model of GOLDEN in batches, and compare the bytes of every row.

    Two verdicts: invariance (rows agree with the same rows run alone, here and now) and golden (rows agree with the
    file). On several ranks a third: all hold the same bytes of what they share. A sweep that could not have failed is called
    vacuous. Of a folder of vectors, every path of this machine is compared with every vector.
    """
    from detinfer.goldens.vectors.file import is_vectors

    if golden is None and resume_file is None:
        raise click.UsageError("Missing argument 'GOLDEN'.", context)
    if golden is not None:
        from detinfer.goldens import pending

        golden = pending.resolve(golden)
    if resume_file is None and golden is not None and is_vectors(golden):
        context.exit(vectors.verify(golden, tp, json_file))
    from detinfer import fingerprint
    from detinfer.cli import jobs as shared
    from detinfer.goldens import axes
    from detinfer.goldens.inputs import Options
    from detinfer.goldens.resume import Broken, Interrupted
    from detinfer.goldens.verify import verify as verify_golden
    from detinfer.reporters import json as json_reporter
    from detinfer.reporters import text

    saved: dict[str, Any] | None = None
    if resume_file is None:
        chosen = Options(n_trials, seed, layers, batch_sizes, control, fail_fast, only_trial, axes.chosen(axis_names))
    else:
        before = shared.interrupted(context, resume_file)
        saved, chosen, golden = before.held, before.options, golden or before.path
        tp = tp or chosen.tp
    assert golden is not None
    shared.check(jobs, tp)
    console = Console(stderr=True, highlight=False, quiet=ranks.number() > 0)
    opening = opened(
        context,
        golden,
        console,
        spec=spec,
        device=device,
        tp=tp,
        reductions=reductions,
        alone=jobs is not None,
        rank_timeout=rank_timeout,
    )
    with shared.stopping(jobs), opening as held:
        if saved is not None and resume_file is not None:
            shared.check_saved(saved, resume_file, held)
        columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with (
            shared.pool(jobs, held, chosen) as pool,
            Progress(*columns, console=console, transient=True) as bar,
        ):
            if pool is None and jobs is not None:  # a process of torchrun whose work is done
                return
            task = bar.add_task("inputs")

            def progress(part: str, done: int, total: int) -> None:
                bar.update(task, description=part, completed=done, total=total)

            parts = held.golden, held.target, held.requests, held.policy
            file = json_file or resume_file or Path(f"{golden.name}.interrupted.json")
            tells: list[Callable[[], Result | None]] = []

            def write(found: Result) -> str:
                json_reporter.write(found, file)
                return f"what was found is kept: detinfer verify --resume {file} goes on"

            def stopped() -> str:
                found = tells[0]() if tells else None
                return "" if found is None else write(found)

            with kept.on_signals(held.ranks, stopped):
                try:
                    result = verify_golden(*parts, chosen, progress, held.ranks, pool, saved, tells.append)
                except (Interrupted, Broken) as stop:
                    console.print(write(stop.result), soft_wrap=True)
                    raise
        if held.ranks.rank == 0:
            if json_file or html_file or junit_file or github:
                result.system_fingerprint = fingerprint.capture(held.policy, held.target.device).to_json()
            if json_file is not None:
                json_reporter.write(result, json_file)
            text.show(result, Console(highlight=False))
            if keep:
                from detinfer.cli import pending as waiting

                waiting.keep(held, result, console)
            if html_file is not None:
                from detinfer.reporters import html

                html.write(result, html_file)
            if junit_file is not None:
                from detinfer.reporters import junit

                junit.write(result, junit_file)
            if github:
                from detinfer.reporters import github as github_reporter

                for line in github_reporter.commands(result):
                    print(line)
                if page := os.environ.get("GITHUB_STEP_SUMMARY"):
                    github_reporter.append(github_reporter.job_summary(result), Path(page))
        held.ranks.share(None)  # a launcher may end the others as soon as one leaves with a verdict
    context.exit(result.exit_code())
