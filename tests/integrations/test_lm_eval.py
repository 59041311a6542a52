"""lm-evaluation-harness, the real package, on a task and a model made here: the same bits, replays, planted faults."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import cli, fingerprint
from detinfer.errors import Diverged
from detinfer.integrations import lm_eval as wrapped
from detinfer.integrations.lm_eval_results import Run

sys.path.append(str(Path(__file__).parent))
import offline

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=offline.MISSING),
    pytest.mark.filterwarnings("default"),  # of the harness and what it imports
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the model and the tasks; the harness's faulty models registered."""
    folder = tmp_path_factory.mktemp("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setattr(torch.backends.mkldnn, "enabled", torch.backends.mkldnn.enabled)
        offline.write_model(folder / "model")
        offline.write_tasks(folder / "tasks")
        wrapped.register()
        # The harness reads its own 13 000 task files before each run, which takes longer than all that is tested here.
        tasks = importlib.import_module("lm_eval.tasks").TaskManager
        patch.setattr(tasks, "__init__", functools.partialmethod(tasks.__init__, include_defaults=False))
        register_faults()
        yield folder


def register_faults() -> None:
    """Models that fail in one way each."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM

    class Batched(HFLM):  # type: ignore[misc]
        """One document's logits are larger by 2^-12 in a batch of more than 3."""

        def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
            logits = super()._model_call(inps, **options)
            if inps.shape[0] > 3:
                wanted = torch.tensor(self.tok_encode(QUESTION_5))
                for row in range(inps.shape[0]):
                    if inps[row, : len(wanted)].tolist() == wanted.tolist():
                        logits[row] *= 1 + 2**-12
            return logits

    class Later(HFLM):  # type: ignore[misc]
        """As it should be in the first three models that are made, and off by 2^-12 in those after."""

        made = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            type(self).made += 1
            self.number = self.made

        def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
            return super()._model_call(inps, **options) * (1.0 if self.number < 4 else 1 + 2**-12)

    class OneByOne(HFLM):  # type: ignore[misc]
        """Never makes a batch, whatever it is given."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return [super(OneByOne, self).loglikelihood([one], disable_tqdm=True)[0] for one in requests]

    class Uncovered(HFLM):  # type: ignore[misc]
        """Runs an operation that nobody covers."""

        def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
            return super()._model_call(inps, **options).cumsum(-1)

    class Remote(LM):  # type: ignore[misc]
        """Answers without a module that could be watched."""

        def __init__(self, **options: Any) -> None:
            super().__init__()

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            return [(-float(len(one.args[1])) / 3, False) for one in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
            raise AssertionError("the task asks for log-likelihoods alone")

        generate_until = loglikelihood_rolling

    for model in (Batched, Later, OneByOne, Uncovered, Remote):
        if model.__name__.lower() not in model_registry.keys():  # noqa: SIM118  (not a mapping)
            model_registry.register(model.__name__.lower(), target=model)


QUESTION_5 = ""
"""The prompt of document 5, set by ``start``."""

Start = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def start(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """``detinfer eval`` of ``lm_eval run`` in the test's folder: exit code, report, and what it said."""
    document = json.loads((place / "tasks/documents.jsonl").read_text().splitlines()[5])
    monkeypatch.setattr(sys.modules[__name__], "QUESTION_5", f"Q: {document['question']} A:")

    def run(
        *words: str, options: tuple[str, ...] = (), model: str = "hf", batch: int = 5, task: str = "choices"
    ) -> tuple[int, dict[str, Any], str]:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        arguments = [] if model == "remote" else ["--model_args", f"pretrained={place / 'model'},dtype=float32"]
        code = cli.run(
            [
                *("eval", "--report", str(report), "--sample", "6", *options, "--", "lm_eval", "run", "--model", model),
                *(*arguments, "--device", "cpu", "--batch_size", str(batch), "--tasks", task),
                *("--include_path", str(place / "tasks"), *words),
            ]
        )
        found = capsys.readouterr()
        return code, json.loads(report.read_text()) if report.exists() else {}, found.err

    return run


def test_the_same_bits_at_every_batch_size(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batch 1, 5 and 32: the same log-probabilities under the policy, others without; the digests and diffs say so."""
    found: dict[str, dict[int, Run]] = {"batch": {}, "off": {}}
    digests: dict[str, set[str]] = {"batch": set(), "off": set()}
    for policy, runs in found.items():
        for batch in (1, 5, 32):
            out = tmp_path / f"{policy}{batch}"
            code, report, said = start(
                *("--output_path", str(out), "--log_samples"), options=("--policy", policy), batch=batch
            )
            assert code == (0 if policy == "batch" else 1), said
            runs[batch] = Run.read(out)
            digests[policy].add(report["runs"][0]["digests"]["results"])
    answers = {
        policy: [json.dumps([one["resps"] for one in run.samples.values()]) for run in runs.values()]
        for policy, runs in found.items()
    }
    assert len(set(answers["batch"])) == 1 and len(set(answers["off"])) == 3
    assert len(digests["batch"]) == 1 and len(digests["off"]) == 3
    marks = {str(run.fingerprint) for run in found["batch"].values()}
    assert len(marks) == 1 and marks.pop().startswith("di1-batch-")
    assert found["off"][1].fingerprint is None
    capsys.readouterr()
    assert cli.run(["eval", "diff", str(tmp_path / "batch1"), str(tmp_path / "batch32")]) == 0
    assert "12 samples compared: 0 answered differently" in capsys.readouterr().out
    assert cli.run(["eval", "diff", str(tmp_path / "off1"), str(tmp_path / "off32")]) == 1
    assert "diverged  task choices, document 0: answers " in capsys.readouterr().out


def test_what_the_results_file_holds(start: Start, tmp_path: Path) -> None:
    """Verdict, policy, digests of model, task and results, the replay's counts, the fingerprint that ``explain`` reads."""
    code, report, said = start(
        "--output_path", str(tmp_path / "out"), "--log_samples", options=("--allow", "aten::cumsum"), task="tales"
    )
    assert code == 0, said
    (file,) = (tmp_path / "out").rglob("results_*.json")
    held = json.loads(file.read_text())["config"]["detinfer"]
    assert held == report["runs"][0]
    assert held["verdict"] == "same" and held["policy"]["allow"] == ["aten::cumsum"]
    replayed = held["replay"]["generate_until"]
    assert replayed["replayed"] == replayed["changed"] == 6 and replayed["compared"] > 12
    assert all(len(digest) == 64 for digest in held["digests"].values()) and len(held["digests"]) == 3
    assert held["operations"]["accepted"] > 20
    assert str(fingerprint.read(file)) == held["system_fingerprint"]["fingerprint"]
    assert "lm_eval" in fingerprint.read(file).fields["environment"]["libraries"]


def test_the_model_digest(place: Path) -> None:
    """The same for two loads and after a batch was padded; another once one bit of one weight differs."""
    model = wrapped.register()
    one, other, third = (
        model(pretrained=str(place / "model"), dtype="float32", device="cpu", batch_size=2) for _ in range(3)
    )
    one.inner.tok_batch_encode(["a", "a longer one"])
    weight = next(third.inner.model.parameters())
    weight.data.view(torch.int32)[0, 0] ^= 1
    assert one.account.model_digest == other.account.model_digest != third.account.model_digest


def test_a_planted_fault_is_named(start: Start, tmp_path: Path) -> None:
    """One document's logits depend on the batch: exit code 1, that document named, the results written and marked."""
    code, report, said = start("--output_path", str(tmp_path), options=("--sample", "48"), model="batched")
    assert code == 1
    named = {one["question"].split(",")[1] for one in report["runs"][0]["replay"]["loglikelihood"]["divergences"]}
    assert named == {" document 5"}
    assert "diverged  task choices, document 5, loglikelihood" in said
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["detinfer"]["verdict"] == "diverged"


def test_a_fault_of_a_later_run(start: Start) -> None:
    """Five runs, each of which agrees with itself; the fourth and the fifth differ from the first."""
    code, report, said = start("--limit", "4", options=("--repeat", "5"), model="later")
    assert code == 1 and [run["verdict"] for run in report["runs"]] == ["same"] * 5, said
    assert [one["how"] for one in report["repeats"]] == ["in run 4"] * 16 + ["in run 5"] * 16
    assert "diverged  task choices, document 0, loglikelihood 0, in run 4" in said


@pytest.mark.parametrize(
    ("model", "task", "words", "options", "code", "says"),
    [
        ("onebyone", "choices", (), (), 5, "no request was seen in another batch"),
        ("hf", "tales", ("--limit", "1"), (), 5, "no request was seen in another batch"),
        ("hf", "tales", ("--gen_kwargs", "do_sample=True,temperature=1.0"), ("--policy", "off"), 5, "drawn at random"),
        ("remote", "choices", (), (), 5, "cannot be seen from this process"),
        ("remote", "choices", (), ("--unobserved", "accept"), 0, "the policy was not in force"),
        ("uncovered", "choices", (), (), 2, "aten::cumsum on float32 is refused"),
        ("no-such-model", "choices", (), (), 2, "no-such-model"),
    ],
)
def test_what_cannot_fail_is_said(
    start: Start, model: str, task: str, words: tuple[str, ...], options: tuple[str, ...], code: int, says: str
) -> None:
    """Batches that did not change, answers drawn at random, batches that cannot be seen; and what is refused."""
    found, _, said = start("--limit", "4", *words, model=model, task=task, options=options)
    assert (found, says in said) == (code, True), said


def test_a_cache_of_answers_is_not_taken(start: Start, tmp_path: Path) -> None:
    """Filled by the first run, which replays past it; refused by the second, which would ask nothing."""
    words = ("--use_cache", str(tmp_path / "cache"), "--limit", "3")
    code, report, said = start(*words)
    assert code == 0 and report["runs"][0]["replay"]["loglikelihood"]["changed"] == 6, said
    code, report, said = start(*words)
    assert code == 2 and "--use_cache: it holds 12 answers of an earlier run" in said


def test_commands_that_are_none_of_the_harness(capsys: pytest.CaptureFixture[str]) -> None:
    """Said at once."""
    assert cli.run(["eval", "--", "pytest", "tests"]) == 2
    assert "a command of lm-evaluation-harness" in capsys.readouterr().err
    assert cli.run(["eval", "--", "lm_eval", "ls", "tasks"]) == 2
    assert "only lm_eval run" in capsys.readouterr().err


def test_without_an_account_a_divergence_is_raised(place: Path) -> None:
    """Used as a model of the harness's own API, outside ``detinfer eval``."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with pytest.raises(Diverged, match=r"task choices, document .*loglikelihood"):
        simple_evaluate(
            model="detinfer",
            model_args={"pretrained": str(place / "model"), "dtype": "float32", "policy": "off", "device": "cpu"},
            batch_size=32,
            tasks=["choices"],
            task_manager=TaskManager(include_path=str(place / "tasks")),
        )
