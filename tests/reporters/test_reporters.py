"""Results as HTML, JUnit XML and commands of GitHub Actions; the page is also opened in a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from detinfer import bits, cli
from detinfer.goldens.result import (
    AxisResult,
    Cause,
    Comparison,
    Control,
    Divergence,
    Invariance,
    Result,
    Tally,
)
from detinfer.reporters import github, html, junit, summary, text

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


def divergence(unit: str = "layers.0.<mlp>", **more: Any) -> Divergence:
    values: dict[str, Any] = {
        "unit": unit,
        "kind": "leaf",
        "type": "Linear",
        "phase": "decode",
        "step": 3,
        "request": 1,
        "path": "",
        "row": (0, 2),
        "element": 7,
        "got": "0x3f80",
        "expected": "0x3f81",
        "ulp": 1,
        "rows_differing": 4,
        "rows_compared": 9,
        "trial": 5,
        "batch": 8,
        "position": 6,
        "command": "detinfer verify g --only-trial 5",
    }
    return Divergence(**{**values, **more})


def result(diverged: bool = True) -> Result:
    """One with a divergence, a located cause, an axis that was not run and a stale field; or a sound one."""
    unit = Tally("layers.0.<mlp>", "leaf", "Linear", 20, 20, 4 if diverged else 0, 3)
    if diverged:
        unit.ulps, unit.trials = {"1": 30, "3-4": 2, "nan": 1, "0": 5}, {"5": 4}
    skipped = Tally("layers.1.odd", "leaf", "Odd", skipped="cannot be replayed: a generator")
    invariance = Invariance(
        verdict="diverged" if diverged else "same",
        trials=7,
        rows_compared=20,
        rows_differing=4 if diverged else 0,
        units=[unit, skipped],
        first=divergence() if diverged else None,
        divergences=[divergence()] if diverged else [],
        axes=[
            AxisResult("batch", "the number of rows", "same", 9, 20, 0, "4 sizes"),
            AxisResult("chunks", "prefill in pieces", "same", 2, 32),
            AxisResult("tp", "the tensor-parallel size", note="promised by scope tp alone"),
        ],
    )
    if diverged:
        invariance.cause = Cause(
            "aten::linear",
            "layers.0.<mlp>",
            "bfloat16",
            "[1, 4]",
            "[8, 4]",
            (0, 7),
            "0x3f80",
            "0x3f81",
            1,
            9,
            4,
            batch=2,
        )
    return Result(
        path="goldens/model",
        target="hf:<model>",
        dtype="bfloat16",
        policy={"scope": "batch", "place": "here"},
        seed=0,
        invariance=invariance,
        golden=Comparison("stale", 3, 20, 0, [("torch", "2.11", "2.13")], None, ["recorded elsewhere"]),
        control=Control("diverged", 3, 2, 9, 4, [Tally("layers.0.<mlp>", "leaf", "Linear", 9, 9, 4, 1)]),
        decisions=[{"op": "aten::linear", "dtypes": ["bfloat16"], "path": "csrc/matmul", "reason": "r", "proof": None}],
        environment={"torch": "2.13", "gpu": {"name": "none"}, "cpu_features": ["a", "b"]},
        system_fingerprint={"fingerprint": "di1-batch-0123456789abcdef"} if diverged else None,
    )


class Page(HTMLParser):
    """Tags, and whether every one that must be closed is."""

    VOID = frozenset({"meta", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("diverged", [True, False])
def test_the_page_is_whole_and_takes_nothing_from_elsewhere(diverged: bool) -> None:
    """Every tag is closed, nothing is fetched or run, names are escaped, tables and regions have names."""
    text = html.page(result(diverged))
    page = Page(text)
    assert page.open == []
    tags = [tag for tag, _ in page.found]
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "hf:&lt;model&gt;" in text
    assert "<mlp>" not in text
    assert all("aria-label" in held for tag, held in page.found if held.get("role") == "region")
    assert all(held.get("scope") in ("col", "row") for tag, held in page.found if tag == "th")
    assert "prefers-color-scheme: dark" in text
    assert ("First cause" in text) == diverged
    assert ("aten::linear</strong>" in text) == diverged
    assert ("<dt>path</dt><dd>csrc/matmul (bfloat16): r</dd>" in text) == diverged, "the path of the first cause"
    assert len(text) < 300_000


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: the page is not opened in a browser")
def test_a_browser_opens_the_page(tmp_path: Path) -> None:
    """No line on the console, and a picture of it that is not of one colour."""
    html.write(result(), tmp_path / "page.html")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += ["--window-size=900,1400", f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_junit_has_a_case_for_each_unit_axis_and_verdict() -> None:
    """Failures carry the place and the command, what was left out its reason; the control is no case."""
    suite = junit.document(result())[0]
    cases = {(case.get("classname"), case.get("name")): case for case in suite.findall("testcase")}
    assert set(cases) == {
        ("units", "layers.0.<mlp>"),
        ("units", "layers.1.odd"),
        ("axes", "batch"),
        ("axes", "chunks"),
        ("axes", "tp"),
        ("verdicts", "invariance"),
        ("verdicts", "golden"),
    }
    failure = cases["units", "layers.0.<mlp>"].find("failure")
    assert failure is not None
    assert "--only-trial 5" in (failure.text or "")
    assert cases["axes", "tp"].find("skipped") is not None
    assert cases["axes", "chunks"].find("failure") is None
    golden = cases["verdicts", "golden"].find("failure")
    assert golden is not None
    assert "stale" in (golden.get("message") or "")
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("7", "3", "2")


def test_commands_of_github() -> None:
    """The first cause first, at most ten, one line each, with what must be escaped escaped."""
    found = github.commands(result())
    assert found[0].startswith("::error title=detinfer invariance%3A layers.0.<mlp>::")
    assert "%0A" in found[0]
    assert "aten::linear" in found[0]
    assert all("\n" not in line for line in found)
    assert len(found) <= github.ANNOTATIONS
    assert "100%25" in github.command("error", "a,b", "100%")
    assert github.command("error", "a,b", "").startswith("::error title=a%2Cb::")
    assert [line.split(" ")[0] for line in github.commands(result(False))] == ["::notice", "::error"]


def test_the_summary_of_a_job_is_cut_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Appended, and cut at a line with a note."""
    page = tmp_path / "summary.md"
    github.append(github.job_summary(result()), page)
    assert "| invariance | **diverged** |" in page.read_text()
    monkeypatch.setattr(github, "SUMMARY_BYTES", 200)
    github.append(github.job_summary(result()), tmp_path / "short.md")
    short = (tmp_path / "short.md").read_bytes()
    assert len(short) <= 200
    assert b"Cut:" in short


def test_every_report_names_the_fingerprint() -> None:
    """The page, JUnit's properties, the summary of a job, the JSON; a result without one says nothing of it."""
    name = "di1-batch-0123456789abcdef"
    for made in (html.page, github.job_summary, lambda one: json.dumps(one.to_json())):
        assert name in made(result()) and name not in made(result(False))
    for diverged, value in ((True, name), (False, "")):
        held = {one.get("name"): one.get("value") for one in junit.document(result(diverged)).iter("property")}
        assert held["system_fingerprint"] == value


def test_distances_are_ordered() -> None:
    """The sign of a zero, then by distance, NaN last."""
    assert [name for name, _ in summary.ulps(result().invariance.units)] == ["0", "1", "3-4", "nan"]


def test_ulp_histogram() -> None:
    """Only elements whose bytes differ, each in its own step."""
    import torch

    wanted = torch.tensor([1.0, 0.0, 2.0, float("nan"), 1.0, 3.0, 5.0])
    step = torch.tensor([0, 0, 1, 0, 2, 3, 5], dtype=torch.int32)
    got = (wanted.view(torch.int32) + step).view(torch.float32)
    got[1], got[3] = -0.0, 1.0
    assert bits.ulp_histogram(got, wanted) == {"nan": 1, "0": 1, "1": 1, "2": 1, "3-4": 1, "5-8": 1}


def test_verify_writes_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One run, four reports; a report that cannot be written is an error of its own."""
    golden = tmp_path / "golden"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert cli.run(["record", "builtin:dense", "-o", str(golden), "--n-prompts", "2"]) == 0
    options = ["--n-trials", "4", "--axes", "batch", "--html", str(tmp_path / "a.html"), "--github"]
    options += ["--junit-xml", str(tmp_path / "a.xml"), "--json", str(tmp_path / "a.json")]
    assert cli.run(["verify", str(golden), *options]) == 0
    assert "::notice title=detinfer invariance%3A same::" in capfd.readouterr().out
    assert Page((tmp_path / "a.html").read_text()).open == []
    assert ElementTree.parse(tmp_path / "a.xml").getroot()[0].get("failures") == "0"
    assert json.loads((tmp_path / "a.json").read_text())["environment"]["torch"]
    assert "**same**" in (tmp_path / "summary.md").read_text()
    options = ["--n-trials", "4", "--axes", "batch", "--html", str(tmp_path / "no" / "a.html")]
    assert cli.run(["verify", str(golden), *options]) == 6


@pytest.mark.parametrize(
    ("ranks", "words"), [([], ""), ([2], ", on rank 2"), ([0, 2], ", on ranks 0 and 2"), ([0, 1, 2], "0, 1 and 2")]
)
def test_every_report_names_the_ranks_of_a_cause(ranks: list[int], words: str) -> None:
    """Those of several on which an operation goes wrong; of one nothing is said."""
    found = result()
    cause = found.invariance.cause
    assert cause is not None
    found.invariance.cause = replace(cause, ranks=ranks)
    with io.StringIO() as printed:
        text.show_cause(found.invariance.cause, Console(file=printed, width=200))
        reports = [printed.getvalue(), html.page(found), github.commands(found)[0], github.job_summary(found)]
    for report in reports:
        assert words in report and ("on rank" in report) == bool(ranks), report
