"""A result as workflow commands of GitHub Actions: annotations, and a summary of the job.

https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands: a step shows ten annotations, a
summary holds one MiB.
"""

from __future__ import annotations

from pathlib import Path

from detinfer.errors import InfrastructureError
from detinfer.goldens.result import Result
from detinfer.reporters import summary

ANNOTATIONS = 10
SUMMARY_BYTES = 1 << 20


def commands(result: Result) -> list[str]:
    """Workflow commands: the first cause first, then the verdicts that are not ``same``; at most ten."""
    found = []
    for what, part in (("invariance", result.invariance), ("golden", result.golden)):
        if part.first is not None:
            cause = getattr(part, "cause", None)
            by = f" by {cause.operation} in {cause.path}{summary.on_ranks(cause)}" if cause is not None else ""
            text = f"{summary.place(part.first)}\n{summary.values(part.first)}{by}\nredo: {part.first.command}"
            found.append(command("error", f"detinfer {what}: {part.first.unit}", text))
    for name, verdict, sentence in summary.verdicts(result):
        if verdict in ("stale", "vacuous"):
            reasons = result.golden.reasons if verdict == "stale" else result.invariance.reasons
            found.append(command("error", f"detinfer {name}: {verdict}", "\n".join([sentence, *reasons])))
        elif name != "control":
            kind = "error" if verdict == "diverged" else "notice"
            found.append(command(kind, f"detinfer {name}: {verdict}", sentence))
    return found[:ANNOTATIONS]


def job_summary(result: Result) -> str:
    """Markdown for the job's page."""
    lines = [f"### detinfer verify `{result.path}`", "", "| | verdict | |", "|---|---|---|"]
    lines += [f"| {name} | **{verdict}** | {sentence} |" for name, verdict, sentence in summary.verdicts(result)]
    if mark := summary.fingerprint(result):
        lines += ["", f"Under `{mark}`."]
    if (cause := result.invariance.cause) is not None:
        lines += [
            "",
            f"First cause: `{cause.operation}` in `{cause.path}`{summary.on_ranks(cause)}: {summary.values(cause)}.",
        ]
    differing = [layer for layer in summary.layers(result.invariance.units) if layer.differing]
    if differing:
        lines += ["", "| layer | rows | differ |", "|---|---|---|"]
        lines += [f"| {layer.name} | {layer.compared:,} | {layer.differing:,} |" for layer in differing]
    return "\n".join(lines) + "\n"


def append(summary: str, path: Path) -> None:
    """Add a summary to the file that GitHub names in ``GITHUB_STEP_SUMMARY``; it is cut at one MiB, and says so."""
    text = summary.encode()
    if len(text) > SUMMARY_BYTES:
        note = f"\n\nCut: {len(text):,} bytes.\n".encode()
        text = text[: SUMMARY_BYTES - len(note)].rsplit(b"\n", 1)[0] + note
    try:
        with path.open("ab") as file:
            file.write(text)
    except OSError as error:
        raise InfrastructureError(f"--github: the summary {path}: {error.strerror}") from error


def command(kind: str, title: str, text: str) -> str:
    """One workflow command: ``kind`` is error, warning or notice."""
    title = _escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={title}::{_escaped(text)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
