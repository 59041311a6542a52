"""``detinfer verify-server``, which is what ``detinfer verify`` is when it is given a URL."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from rich.console import Console

from detinfer.cli import options
from detinfer.errors import UsageError

_MODES = ("single", "mixed", "prefix", "radix_cache", "p_vs_d")
_ROUTES = {"/v1/chat/completions": "chat", "/v1/completions": "openai", "/generate": "sglang", "/v1": "auto"}


def numbers(_: object, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """``1,8,64`` as numbers; None where nothing, or auto, is given."""
    if value is None or value == "auto":
        return None
    try:
        found = tuple(int(number) for number in value.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"{parameter.opts[0]} {value}: whole numbers from 1 with commas between them, or auto")
    return found


def _body(_: object, parameter: click.Parameter, value: str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        held = json.loads(value)
    except ValueError:
        held = None
    if not isinstance(held, dict):
        raise UsageError(f"{parameter.opts[0]} {value}: a JSON object such as '{{\"priority\": 1}}'")
    return held


def _place(url: str, api: str) -> tuple[str, str]:
    """The server's root and its API, of a URL that may name a route such as /v1/chat/completions."""
    path = urlsplit(url).path.rstrip("/")
    for route, named in _ROUTES.items():
        if path.endswith(route):
            return url.rstrip("/").removesuffix(route), named if api == "auto" else api
    return url, api


@click.command("verify-server")
@click.argument("url", required=False)
@click.option("--host", default="localhost", show_default=True, help="The server, where no URL is given.")
@click.option("--port", default=30000, show_default=True, help="Its port, where no URL is given.")
@click.option("--api", type=click.Choice(["auto", "sglang", "openai", "chat"]), default="auto", show_default=True)
@click.option("--model", metavar="NAME", help="Model to ask for [default: the server's only one].")
@click.option(
    "--test-mode", "modes", type=click.Choice([*_MODES, "all"]), multiple=True, help="Repeatable [default: single]."
)
@click.option(
    "--n-trials", default=50, show_default=True, type=click.IntRange(min=1), help="Batches to send in a mode."
)
@click.option(
    "--n-start", type=click.IntRange(min=1), help="Sizes N, N+1, ... in place of sizes up to 65, edges first."
)
@click.option("--batch-sizes", callback=numbers, metavar="1,2,...", help="Sizes to use in turn.")
@click.option(
    "--concurrency", callback=numbers, metavar="1,8,...", help="Requests at once, in turn [default: by mode]."
)
@click.option("--prefix-lengths", callback=numbers, metavar="1,511,...", help="Tokens of the prefixes of mode prefix.")
@click.option("--seed", default=0, show_default=True, help="Seed of prompts, sizes, orders and delays.")
@click.option("--only-trial", type=int, metavar="N", help="Redo trial N alone.")
@click.option("--fail-fast", is_flag=True, help="Stop a mode at the first trial that diverges.")
@click.option("--max-new-tokens", default=100, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=-1, show_default=True)
@click.option("--min-p", default=0.0, show_default=True)
@click.option("--sampling-seed", default=42, show_default=True, help="Seed of every request.")
@click.option("--frequency-penalty", default=0.0, show_default=True)
@click.option("--presence-penalty", default=0.0, show_default=True)
@click.option(
    "--max-token-id", type=click.IntRange(min=2), metavar="N", help="Draw token ids below N [default: 20000]."
)
@click.option(
    "--return-logprob/--no-return-logprob", default=True, show_default=True, help="Compare log-probabilities."
)
@click.option("--stream", is_flag=True, help="Have answers streamed.")
@click.option("--body", callback=_body, metavar="JSON", help="Fields to add to every request.")
@click.option("--control-url", metavar="URL", help="A server where differences are expected.")
@click.option("--control-body", callback=_body, metavar="JSON", help="Fields that make this server one.")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds for one attempt.")
@click.option(
    "--retries", default=2, show_default=True, type=click.IntRange(min=0), help="Further attempts at a request."
)
@click.option("--api-key-env", metavar="NAME", help="Environment variable that holds the server's key.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result as JSON.")
@click.option("--junit-xml", "junit_file", type=click.Path(dir_okay=False, path_type=Path), help="Write JUnit XML.")
@click.option("--html", "html_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a page for people.")
@click.option("--github", is_flag=True, help="Print annotations of GitHub Actions and add to the job's summary.")
@click.pass_context
def verify_server(
    context: click.Context,
    url: str | None,
    host: str,
    port: int,
    api: str,
    model: str | None,
    modes: tuple[str, ...],
    n_trials: int,
    n_start: int | None,
    batch_sizes: tuple[int, ...] | None,
    concurrency: tuple[int, ...] | None,
    prefix_lengths: tuple[int, ...] | None,
    seed: int,
    only_trial: int | None,
    fail_fast: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    sampling_seed: int,
    frequency_penalty: float,
    presence_penalty: float,
    max_token_id: int | None,
    return_logprob: bool,
    stream: bool,
    body: dict[str, Any] | None,
    control_url: str | None,
    control_body: dict[str, Any] | None,
    timeout: float,
    retries: int,
    api_key_env: str | None,
    json_file: Path | None,
    junit_file: Path | None,
    html_file: Path | None,
    github: bool,
) -> None:
    """Ask the server at URL the same prompts alone and in batches, and compare every bit of the answers.

    Also spelled detinfer verify URL. Speaks SGLang's own API and OpenAI's completions and chat completions. A fault of
    the server (a timeout, a 5xx, a broken connection) is retried and never taken for a difference: exit code 6.
    """
    from detinfer.integrations.server import report, sweep
    from detinfer.integrations.server.api import Sampling
    from detinfer.integrations.server.verify import MODES, Access, Control, verify
    from detinfer.reporters import github as github_reporter
    from detinfer.reporters import html, junit
    from detinfer.reporters import json as json_reporter

    if control_url is not None and control_body is not None:
        raise UsageError("--control-url and --control-body: give one of them")
    if batch_sizes is not None and n_start is not None:
        raise UsageError("--batch-sizes and --n-start: give one of them")
    token = None
    if api_key_env is not None:
        token = os.environ.get(api_key_env)
        if not token:
            raise UsageError(f"--api-key-env {api_key_env}: the environment has no such variable, or it is empty")
    root, named = _place(url or f"http://{host}:{port}", api)
    access = Access(root, named, model, timeout, retries, token)
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=sampling_seed,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        logprobs=return_logprob,
        stream=stream,
        extra=body or {},
    )
    out = Console(highlight=False)
    chosen = sweep.Options(
        n_trials=n_trials,
        n_start=n_start,
        seed=seed,
        sizes=batch_sizes,
        concurrency=concurrency,
        prefixes=prefix_lengths or sweep.PREFIXES,
        only_trial=only_trial,
        fail_fast=fail_fast,
        highest_id=max_token_id,
        command=options.command_line(("--json", "--junit-xml", "--test-mode", "--only-trial")),
        said=lambda line: out.print(line, soft_wrap=True, markup=False),
    )
    control = None
    if control_url is not None:
        place, control_api = _place(control_url, api)
        control = Control(place, Access(place, control_api, model, timeout, retries, token), sampling)
    elif control_body is not None:
        from dataclasses import replace

        held = replace(sampling, extra={**sampling.extra, **control_body})
        control = Control(f"with {json.dumps(control_body)}", access, held)
    wanted = MODES if "all" in modes else tuple(dict.fromkeys(modes)) or ("single",)
    result = verify(access, wanted, sampling, chosen, control)
    if json_file is not None:
        json_reporter.write(result, json_file)
    if junit_file is not None:
        junit.save(report.document(result), junit_file)
    report.show(result, out)
    if html_file is not None:
        html.save(html.rendered("server.html", **report.page(result)), html_file)
    if github:
        for line in report.commands(result):
            print(line)
        if page := os.environ.get("GITHUB_STEP_SUMMARY"):
            github_reporter.append(report.job_summary(result), Path(page))
    context.exit(result.exit_code())
