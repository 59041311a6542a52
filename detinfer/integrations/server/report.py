"""A server's result as text, in the lines of SGLang's test where it has one, as JUnit XML, a page, and GitHub's commands."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from detinfer.integrations.server.result import Divergence, Part, ServerResult
from detinfer.reporters import github

_STYLES = {"same": "green", "diverged": "bold red", "unanswered": "yellow", "vacuous": "yellow"}
CHANGED = ": it changed while it was asked"
SHOWN = 5
"""Differences printed; the JSON has more."""


def show(result: ServerResult, console: Console) -> None:
    """Print the counts, the first differences, the faults and the verdicts."""
    for part in result.parts:
        for line in lines(part, result.logprobs):
            console.print(line, soft_wrap=True, markup=False)
        console.print()
    failed = sum(result.faults.values())
    kinds = ", ".join(f"{kind} x {count}" for kind, count in result.faults.items())
    console.print(
        f"server   {result.url} ({result.api}): {result.requests:,} requests, at most {result.most_at_once} at once, "
        f"{failed} faults{f' ({kinds})' if kinds else ''}, {result.retried} retried",
        soft_wrap=True,
    )
    if result.system_fingerprints:
        named = ", ".join(result.system_fingerprints)
        console.print(
            f"answers     under {named}{CHANGED if len(result.system_fingerprints) > 1 else ''}", soft_wrap=True
        )
    control = {part.mode: part for part in result.control}
    for part in result.parts:
        style = _STYLES[part.verdict]
        console.print(f"{part.mode:<11} [{style}]{part.verdict.upper()}[/]  {_counts(part)}", soft_wrap=True)
        for reason in (*part.reasons, *part.notes):
            console.print(f"            {reason}", soft_wrap=True, markup=False)
        if part.mode in control:
            off = control[part.mode]
            console.print(f"            control: {off.differing:,} of {off.compared:,} answers differ", soft_wrap=True)
    if not result.control:
        console.print("control     none: that these requests can tell a server that varies is not shown", style="dim")


def lines(part: Part, logprobs: bool) -> Iterator[str]:
    """One mode as SGLang's test prints it, and where the first differences are."""
    total = sum(part.samples)
    if part.mode in ("single", "mixed"):
        several = f" (the most of any of {len(part.prompts)} prompts)"
        yield f"Total samples: {total}, Unique samples: {max(part.unique, default=0)}{several}"
        yield f"Unique output token ID sequences: {max(part.unique_tokens, default=0)}"
    elif part.mode == "prefix":
        for number, (name, samples, unique) in enumerate(zip(part.prompts, part.samples, part.unique, strict=True)):
            yield f"Prompt {number} with {name}: total samples: {samples}, Unique samples: {unique}"
    for found in part.divergences[:SHOWN]:
        yield f"  ✗ {place(found, part)}: {found.said}"
        if found.command:
            yield f"    redo: {found.command}"
    if part.differing > SHOWN:
        yield f"  ✗ Found {part.differing} mismatched samples out of {part.compared}"
    if part.verdict == "same" and part.mode != "radix_cache":
        yield f"✓ All {total} samples have identical text and output token IDs{' and exact logprobs' if logprobs else ''}"
    if part.mode == "radix_cache" and part.verdict in ("same", "diverged"):
        yield (
            "✓✓✓ TEST PASSED - Radix cache is consistent! ✓✓✓"
            if part.verdict == "same"
            else "✗✗✗ TEST FAILED - Radix cache produces different results! ✗✗✗"
        )


def place(found: Divergence, part: Part) -> str:
    """Which answer of which trial."""
    name = part.prompts[found.prompt] if found.prompt < len(part.prompts) else f"sequence {found.prompt}"
    return f"trial {found.trial}, batch size {found.size}, position {found.position}, prompt {found.prompt} ({name})"


def document(result: ServerResult) -> ElementTree.Element:
    """JUnit's ``testsuites``: a case for each trial, and for each mode's verdict; an answer that never came is an error."""
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", name=f"detinfer verify {result.url}")
    properties = ElementTree.SubElement(suite, "properties")
    held = {
        "system_fingerprint": ", ".join(result.system_fingerprints),
        "api": result.api,
        "model": result.model or "",
        "seed": str(result.seed),
        "faults": str(result.faults),
    }
    for name, value in held.items():
        ElementTree.SubElement(properties, "property", name=name, value=value)
    for part in result.parts:
        firsts = {found.trial: found for found in reversed(part.divergences)}
        for trial in part.trials:
            case = ElementTree.SubElement(
                suite, "testcase", classname=part.mode, name=f"trial {trial.number}, batch size {trial.size}"
            )
            if trial.differing:
                said = f"{trial.differing} of {trial.compared} answers differ"
                first = firsts.get(trial.number)
                detail = f"{place(first, part)}\n{first.said}\n{first.command}" if first else ""
                ElementTree.SubElement(case, "failure", message=said).text = _clean(detail)
            elif trial.unanswered:
                ElementTree.SubElement(case, "error", message=f"{trial.unanswered} of {trial.size} answers never came")
        case = ElementTree.SubElement(suite, "testcase", classname="verdicts", name=part.mode)
        if part.verdict != "same":
            kind = "error" if part.verdict == "unanswered" else "failure"
            message = f"{part.verdict}: {part.differing} of {part.compared} answers differ"
            ElementTree.SubElement(case, kind, message=message).text = _clean("\n".join([*part.reasons, *part.notes]))
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    return root


def page(result: ServerResult) -> dict[str, Any]:
    """What the template ``server.html`` is filled with."""
    return {"result": result, "control": {part.mode: part for part in result.control}, "place": place}


def commands(result: ServerResult) -> list[str]:
    """Annotations for GitHub Actions, the first difference of each mode first; at most ten."""
    found = []
    for part in result.parts:
        if part.first is not None:
            text = f"{place(part.first, part)}\n{part.first.said}\n{part.first.command}"
            found.append(github.command("error", f"detinfer {part.mode}: an answer differs", _clean(text)))
    for part in result.parts:
        kind = "notice" if part.verdict == "same" else "error"
        text = "\n".join([_counts(part), *part.reasons, *part.notes])
        found.append(github.command(kind, f"detinfer {part.mode}: {part.verdict}", _clean(text)))
    return found[: github.ANNOTATIONS]


def job_summary(result: ServerResult) -> str:
    """Markdown for the job's page."""
    lines = [f"### detinfer verify `{result.url}`", "", "| | verdict | |", "|---|---|---|"]
    lines += [f"| {part.mode} | **{part.verdict}** | {_counts(part)} |" for part in result.parts]
    if result.faults:
        lines += ["", "Faults: " + ", ".join(f"{kind} x {count}" for kind, count in result.faults.items()) + "."]
    if result.system_fingerprints:
        lines += ["", "Answers under " + ", ".join(f"`{name}`" for name in result.system_fingerprints) + "."]
    return "\n".join(lines) + "\n"


def _counts(part: Part) -> str:
    missing = f", {part.unanswered} unanswered" if part.unanswered else ""
    return f"{part.differing:,} of {part.compared:,} answers differ{missing}"


def _clean(text: str) -> str:
    """Without the control characters that XML has no way to write; a server may send any."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)
