"""``detinfer verify URL`` against a scripted server that misbehaves in every way a server can."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from scripted_server import Script, serving

from detinfer.cli import run
from detinfer.integrations.server import report, sweep
from detinfer.integrations.server.answer import Answer, difference
from detinfer.integrations.server.api import Sampling
from detinfer.integrations.server.result import ServerResult
from detinfer.integrations.server.sweep import Options
from detinfer.integrations.server.transport import Unanswered
from detinfer.integrations.server.verify import Access, Control, verify
from detinfer.reporters import html

SIZES = (1, 2, 7, 9)
PREFIXES = (1, 15, 40)
FEW = Sampling(max_new_tokens=3)


def verified(
    script: Script,
    *modes: str,
    sampling: Sampling = FEW,
    control: Script | None = None,
    api: str = "auto",
    **options: object,
) -> ServerResult:
    """The result for a server that follows ``script``."""
    chosen = Options(**{"n_trials": 4, "sizes": SIZES, "prefixes": PREFIXES, **options})  # type: ignore[arg-type]
    with serving(script) as (url, _):
        access = Access(url, api, timeout=0.3 if script.fault in ("timeout", "drip") else 20.0, retries=1)
        if control is None:
            return verify(access, modes or ("single",), sampling, chosen)
        with serving(control) as (other, _):
            return verify(access, modes, sampling, chosen, Control("other", Access(other, api), sampling))


@pytest.mark.parametrize(
    ("api", "stream"), [("sglang", False), ("sglang", True), ("openai", False), ("openai", True), ("chat", False)]
)
def test_a_steady_server_is_the_same(api: str, stream: bool) -> None:
    """Every API in the modes that form batches, streamed where the scripted server streams."""
    modes = ("single", "mixed") if api == "chat" else ("single", "mixed", "prefix")
    result = verified(Script(api=api), *modes, sampling=Sampling(max_new_tokens=3, stream=stream), api=api)
    assert [(part.mode, part.verdict) for part in result.parts] == [(mode, "same") for mode in modes]
    assert result.exit_code() == 0
    for part in result.parts:
        assert part.compared == sum(SIZES), "every answer of every batch is compared, not the first alone"


@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_caches_are_the_same(api: str) -> None:
    """A cached prefix, and prefill after decode."""
    result = verified(Script(api=api), "radix_cache", "p_vs_d")
    assert [part.verdict for part in result.parts] == ["same", "same"]
    assert result.parts[1].compared == sum(SIZES)


@pytest.mark.parametrize(
    ("script", "mode", "first"),
    [
        (Script(batch_from=9), "single", ("logprobs", 9, 0)),
        (Script(api="openai", batch_from=9), "single", None),
        (Script(position_from=5), "single", ("logprobs", 7, 5)),
        (Script(position_from=1), "prefix", ("logprobs", 2, 1)),
        (Script(api="openai", lists=False, crowd_from=3, seconds=0.03), "mixed", None),
        (Script(api="openai", lists=False, crowd_from=5, seconds=0.05), "single", None),
        (Script(cache_differs=True), "radix_cache", ("logprobs", 1, 0)),
        (Script(cache_differs=True, cache_text=True), "radix_cache", ("tokens", 1, 0)),
        (Script(api="openai", cache_differs=True), "radix_cache", ("logprobs", 1, 0)),
        (Script(decode_differs=True), "p_vs_d", None),
        (Script(api="openai", decode_differs=True), "p_vs_d", None),
    ],
)
def test_divergence_is_found(script: Script, mode: str, first: tuple[str, int, int] | None) -> None:
    """By batch size, by position, by requests in flight, by the prefix cache, by decoding: one ULP is enough."""
    concurrency = (1,) if script.lists else None
    result = verified(script, mode, concurrency=concurrency)
    part = result.parts[0]
    assert (part.verdict, result.exit_code()) == ("diverged", 1)
    assert part.first is not None and part.first.command == ""
    if first is not None:
        assert (part.first.field, part.first.size, part.first.position) == first
    assert part.differing < part.compared or mode == "radix_cache" or mode == "p_vs_d"


def test_texts_hide_what_logprobs_show() -> None:
    """The same fault, with log-probabilities left out: the texts agree."""
    script = Script(batch_from=7)
    assert verified(script, "single", concurrency=(1,)).exit_code() == 1
    texts = Sampling(max_new_tokens=3, logprobs=False)
    assert verified(script, "single", concurrency=(1,), sampling=texts).exit_code() == 0


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("timeout", "timeout"),
        ("drip", "timeout"),
        ("500", "status 500"),
        ("disconnect", "disconnect"),
        ("truncated", "disconnect"),
        ("malformed", "malformed"),
        ("fewer", "items"),
    ],
)
def test_a_fault_is_retried_and_no_divergence(fault: str, kind: str) -> None:
    """Once: retried, counted, the verdict stands. Always: exit code 6, and never a divergence."""
    once = verified(Script(fault=fault, after=12, times=1))
    assert (once.parts[0].verdict, once.exit_code(), once.faults, once.retried) == ("same", 0, {kind: 1}, 1)
    after = 2 + max(SIZES)  # the probes and the references are answered
    always = verified(Script(fault=fault, after=after))
    part = always.parts[0]
    assert (part.verdict, always.exit_code(), part.differing) == ("unanswered", 6, 0)
    assert part.unanswered == part.trials[0].size + part.trials[1].size, "two silent trials end it"
    assert set(always.faults) == {kind}


def test_divergence_beside_faults_is_still_divergence() -> None:
    """What was seen to differ differs, whatever else went wrong."""
    result = verified(Script(position_from=1, fault="500", after=2 + max(SIZES) + 3, times=99), concurrency=(1,))
    assert result.parts[0].unanswered > 0
    assert (result.parts[0].verdict, result.exit_code()) == ("diverged", 1)


def test_a_server_that_is_not_there() -> None:
    """Nothing listens: an infrastructure error that says where."""
    with serving(Script()) as (url, _):
        pass
    with pytest.raises(Unanswered, match=r"nothing listens there .*unreachable"):
        verify(Access(url, retries=1), ["single"], FEW, Options(n_trials=2))
    assert run(["verify", url, "--retries", "0"]) == 6


@pytest.mark.parametrize(
    ("script", "options", "reason"),
    [
        (Script(logprobs=False), {}, "no log-probabilities"),
        (Script(constant=True), {}, "one and the same answer"),
        (Script(empty=True), {}, "every answer is empty"),
        (Script(), {"sizes": (1,)}, "no batch had two prompts"),
        (Script(api="openai", lists=False), {"concurrency": (1,)}, "never were two requests in flight"),
    ],
)
def test_what_could_not_have_failed_is_vacuous(script: Script, options: dict[str, object], reason: str) -> None:
    """Agreement that proves nothing is not reported as agreement."""
    result = verified(script, "single", **options)
    assert (result.parts[0].verdict, result.exit_code()) == ("vacuous", 5)
    assert reason in " ".join(result.parts[0].reasons)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script(caches=False), "no token came out of its cache"),
        (Script(api="openai", flushes=False), "cannot empty its cache nor report"),
    ],
)
def test_a_cache_that_was_not_used_is_vacuous(script: Script, reason: str) -> None:
    """Two uncached runs agree, and say nothing about a cache."""
    result = verified(script, "radix_cache")
    assert (result.exit_code(), reason in " ".join(result.parts[0].reasons)) == (5, True)


def test_control() -> None:
    """A control that diverges supports the verdict; one that does not makes it vacuous."""
    shown = verified(Script(), "single", control=Script(batch_from=2), concurrency=(1,))
    assert (shown.parts[0].verdict, shown.control[0].verdict) == ("same", "diverged")
    blind = verified(Script(), "single", control=Script(), concurrency=(1,))
    assert (blind.parts[0].verdict, blind.exit_code()) == ("vacuous", 5)
    assert "control" in blind.parts[0].reasons[0]


def test_plans_come_from_the_seed() -> None:
    """The same seed plans the same; another does not; neighbours are distinct, places random, sizes around 64 first."""
    options = Options(n_trials=30)
    plans = sweep.plan("single", options, sweep.LARGEST, True)
    assert plans == sweep.plan("single", options, sweep.LARGEST, True)
    assert plans != sweep.plan("single", Options(n_trials=30, seed=1), sweep.LARGEST, True)
    assert [len(one.members) for one in plans[:5]] == [1, 2, 64, 65, 63]
    assert all(len(set(one.members)) == len(one.members) for one in plans)
    assert len({one.members.index(0) for one in plans if 0 in one.members}) > 3
    alone = sweep.plan("single", Options(n_trials=30), sweep.LARGEST, True)[7]
    assert alone == plans[7], "a trial is planned from its number alone: --only-trial redoes it"
    assert sweep.sizes_of(Options(n_trials=3, n_start=5)) == [5, 6, 7]


def test_difference_is_of_bits() -> None:
    """-0.0 is not 0.0; a value that is not finite is no agreement; a missing list is not an empty one."""
    one = Answer("a", (1,), (0.0,))
    assert difference(one, one) is None
    assert difference(one, Answer("a", (1,), (-0.0,))) is not None
    assert difference(one, Answer("a", (1,), None)) is not None
    nan = Answer("a", (1,), (float("nan"),))
    assert difference(nan, nan) is not None
    found = difference(Answer("a", (1, 2), (0.5, -1.25)), Answer("a", (1, 2), (0.5, -1.0)))
    assert str(found) == "Logprob mismatch at position 1: -1.25 vs -1.0 (diff: -0.25)"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`detinfer verify URL` writes SGLang's lines and every report; the control field makes the same server differ."""
    files = ["--json", str(tmp_path / "r.json"), "--junit-xml", str(tmp_path / "r.xml"), "--github"]
    files += ["--html", str(tmp_path / "r.html")]
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    options = ["--batch-sizes", "1,2,9", "--n-trials", "3", "--max-new-tokens", "3", "--concurrency", "1"]
    script = Script(batch_from=9, only_with="off")
    with serving(script) as (url, state):
        assert run(["verify", url, *options, "--control-body", '{"off": true}']) == 0
        assert run(["verify", url, *options, "--body", '{"off": true}', *files]) == 1
        assert run(["verify", f"{url}/generate", *options, "--api-key-env", "NO_SUCH_VARIABLE"]) == 2
        assert run(["verify", url, "--batch-sizes", "0"]) == 2
        assert state.bodies[-1]["off"] is True
    printed = capsys.readouterr().out
    assert "Total samples: 21, Unique samples: 1 " in printed and "Unique samples: 2 " in printed
    assert "✓ All 21 samples have identical text and output token IDs and exact logprobs" in printed
    assert "Trial 3 with batch size 9: " in printed
    held = json.loads((tmp_path / "r.json").read_text())
    assert held["schema"] == 1 and held["parts"][0]["first"]["trial"] == 3 and held["parts"][0]["first"]["size"] == 9
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("4", "2", "0")
    commands = [line for line in printed.splitlines() if line.startswith("::")]
    assert commands[0].startswith(
        "::error title=detinfer single%3A an answer differs::trial 3, batch size 9, position "
    )
    assert (
        "%0ALogprob mismatch at position 0" in commands[0]
        and "::error title=detinfer single%3A diverged" in commands[1]
    )
    assert "| single | **diverged** | 9 of 12 answers differ |" in (tmp_path / "summary.md").read_text()
    page = (tmp_path / "r.html").read_text()
    assert (
        "diverged" in page and "trial 3, batch size 9, position 0" in page and held["parts"][0]["first"]["got"] in page
    )
    assert not re.search(r"<(script|link|img)|url\(|@import", page)


def test_the_page_says_what_went_wrong() -> None:
    """Faults, answers that never came, the control, names that must be escaped."""
    result = verified(Script(fault="500", after=2 + max(SIZES)))
    result.url = "http://<host>"
    page = html.rendered("server.html", **report.page(result))
    assert "http://&lt;host&gt;" in page and "<host>" not in page
    assert "status 500 x " in page and "unanswered" in page and "No control" in page
    assert page.count("<section") == page.count("</section>") == 1
    controlled = verified(Script(), "single", control=Script(batch_from=7))
    assert "control: " in html.rendered("server.html", **report.page(controlled))


def test_the_servers_fingerprint() -> None:
    """What answers name goes into the result and its reports; a change while it was asked is said."""
    for api, stream in (("openai", False), ("openai", True), ("chat", False)):
        sampling = Sampling(max_new_tokens=3, stream=stream)
        result = verified(Script(api=api, fingerprint="di1-batch-0123456789abcdef"), sampling=sampling, api=api)
        assert set(result.system_fingerprints) == {"di1-batch-0123456789abcdef"}, (api, stream)
        assert result.system_fingerprint == {"fingerprint": "di1-batch-0123456789abcdef"}
        held = {one.get("name"): one.get("value") for one in report.document(result).iter("property")}
        assert held["system_fingerprint"] == "di1-batch-0123456789abcdef"
        assert "di1-batch-0123456789abcdef" in html.rendered("server.html", **report.page(result))
        assert "di1-batch-0123456789abcdef" in report.job_summary(result)
    result = verified(Script(api="openai", fingerprint="fp_a"))
    assert set(result.system_fingerprints) == {"fp_a"} and result.system_fingerprint is None
    result.system_fingerprints["fp_b"] = 1
    assert "it changed while it was asked" in html.rendered("server.html", **report.page(result))
    assert verified(Script()).system_fingerprints == {}


def test_junit_tells_faults_from_differences() -> None:
    """An answer that never came is an error, not a failure."""
    result = verified(Script(fault="500", after=2 + max(SIZES)))
    suite = report.document(result)[0]
    assert (suite.get("failures"), suite.get("errors")) == ("0", "3")


def test_only_trial_redoes_one() -> None:
    """--only-trial sends that batch again, in the same order."""
    whole = verified(Script(position_from=5), concurrency=(1,)).parts[0]
    again = verified(Script(position_from=5), concurrency=(1,), only_trial=4).parts[0]
    assert [trial.number for trial in again.trials] == [4]
    expected = [(f.prompt, f.position, f.got) for f in whole.divergences if f.trial == 4]
    assert [(f.prompt, f.position, f.got) for f in again.divergences] == expected != []
