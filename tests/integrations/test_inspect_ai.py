"""Inspect, the real package, on a task and a model made here: the same bits, replays, planted faults."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detinfer import cli, fingerprint
from detinfer.integrations import inspect_ai as wrapped

sys.path.append(str(Path(__file__).parent))
import offline

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("inspect_ai") is None, reason="Inspect is not installed here: pip install inspect-ai"
    ),
    pytest.mark.filterwarnings("ignore"),  # of Inspect and what it imports
]

TASK = """
import json
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def tales(most=12):
    lines = [json.loads(line) for line in open({documents!r})][:most]
    samples = [Sample(input=f"Q: {{one['question']}} A:", target="a", id=number) for number, one in enumerate(lines)]
    return Task(samples, solver=generate(), scorer=includes(), config=GenerateConfig(max_tokens=6))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the model and the task; a faulty provider registered."""
    folder = tmp_path_factory.mktemp("inspect_ai")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("INSPECT_DISPLAY", "none")
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        patch.chdir(folder)
        offline.write_model(folder / "model")
        documents = offline.write_tasks(folder / "tasks") / "documents.jsonl"
        (folder / "task.py").write_text(TASK.format(documents=str(documents)))
        register_faults(folder)
        from inspect_ai.model._providers import hf

        async def soon(seconds: float) -> None:
            await sleep(0.01)

        sleep = hf.anyio.sleep  # the provider looks once a second whether its batch is there
        quick = types.SimpleNamespace(**{**vars(hf.anyio), "sleep": soon})
        patch.setattr(hf, "anyio", quick)
        drain = hf._drain_batches  # and waits two for further requests
        patch.setattr(hf, "_drain_batches", lambda queue, timeout: drain(queue, 0.2))
        yield folder


def register_faults(folder: Path) -> None:
    """Providers that fail in one way each."""
    from inspect_ai.model import ModelAPI, ModelOutput, modelapi
    from inspect_ai.model._providers.hf import HuggingFaceAPI

    class Batched(HuggingFaceAPI):  # type: ignore[misc]
        """Sample 5's logits depend on the batch."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            words = self.tokenizer.encode(offline.question(folder / "tasks", 5), add_special_tokens=False)
            offline.plant(self.model, words)

    class Uncovered(HuggingFaceAPI):  # type: ignore[misc]
        """Runs an operation that nobody covers."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.model.register_forward_hook(lambda module, inputs, output: output.logits.cumsum(-1) and None)

    class UncoveredAlone(HuggingFaceAPI):  # type: ignore[misc]
        """The same, in batches that only a replay makes."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.model.register_forward_hook(self._sum)

        def _sum(self, module: Any, inputs: Any, output: Any) -> None:
            if len(output.logits) < 3:
                output.logits.cumsum(-1)

    modelapi(name="uncovered-alone")(UncoveredAlone)

    class Remote(ModelAPI):  # type: ignore[misc]
        """Answers without a module that could be watched."""

        def __init__(self, model_name: str, base_url: Any = None, api_key: Any = None, config: Any = None) -> None:
            super().__init__(model_name, base_url, api_key, [], config)

        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:
            return ModelOutput.from_content(self.model_name, input[-1].text[::-1])

    class Later(HuggingFaceAPI):  # type: ignore[misc]
        """As it should be in the first run, whose twelve requests are six calls, and off by 2^-12 in all calls after."""

        calls = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.model.register_forward_hook(self._later, with_kwargs=True)

        def _later(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            type(self).calls += output.logits.shape[0] == 12
            if self.calls > 6:
                output.logits *= 1 + 2**-12
            return output

    modelapi(name="later")(Later)
    modelapi(name="remote")(Remote)
    modelapi(name="batched")(Batched)
    modelapi(name="uncovered")(Uncovered)


Start = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def start(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Start:
    """``detinfer eval`` of Inspect in the test's folder: exit code, report, and what it said."""

    def run(
        *words: str,
        options: tuple[str, ...] = (),
        model: str = "hf",
        sample: int = 3,
        batch: int = 12,
        draws: str = "false",
    ) -> tuple[int, dict[str, Any], str]:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        own = ["-M", "device=cpu", "-M", "dtype=float32", "-M", f"do_sample={draws}"] if model != "remote" else []
        code = cli.run(
            [
                *("eval", "--report", str(report), "--sample", str(sample), *options, "--", "inspect", "eval"),
                *("task.py", "--model", f"{model}/model", "--max-connections", str(batch), *own),
                *("--log-dir", str(tmp_path / "logs"), *words),
            ]
        )
        return code, json.loads(report.read_text()) if report.exists() else {}, capsys.readouterr().err

    return run


def held(folder: Path) -> dict[str, Any]:
    """The account in the one log there is, and the log's status."""
    from inspect_ai.log import read_eval_log

    (file,) = (folder / "logs").glob("*.eval")
    log = read_eval_log(str(file))
    assert len(log.samples) == 12, "the log keeps its samples"
    return {**log.eval.metadata["detinfer"], "status": log.status, "error": log.error and log.error.message}


def test_what_the_log_holds(start: Start, tmp_path: Path) -> None:
    """The account, and its fingerprint; an answer has no log-probabilities that nobody wanted."""
    from inspect_ai.log import read_eval_log

    code, report, said = start()
    assert code == 0, said
    account = held(tmp_path)
    assert account.items() >= report["runs"][0].items() and account["verdict"] == "same"
    assert account["replay"]["generate"]["changed"] == 3 and account["replay"]["generate"]["asked"] == 12
    assert account["operations"]["accepted"] > 20
    mark = fingerprint.from_json(account["system_fingerprint"])
    assert str(mark).startswith("di1-batch-") and "inspect_ai" in mark.fields["environment"]["libraries"]
    (file,) = (tmp_path / "logs").glob("*.eval")
    outputs = [sample.output for sample in read_eval_log(str(file)).samples]
    assert all(output.choices[0].logprobs is None and output.completion for output in outputs)
    assert start(batch=3)[1]["runs"][0]["digests"] == account["digests"], "other batches are the same task and results"


def test_without_the_policy(start: Start) -> None:
    """In float32 torch's own products depend on the batch: log-probabilities differ, whether or not a text does."""
    code, report, said = start(options=("--policy", "off"))
    assert code == 1 and report["runs"][0]["replay"]["generate"]["diverged"] > 0, said
    assert "diverged  task tales, sample " in said


def test_a_planted_fault_is_named(start: Start, tmp_path: Path) -> None:
    """One sample's logits depend on the batch: exit code 1, that sample named, the log written and marked."""
    code, report, said = start(model="batched", sample=12)
    assert code == 1, said
    named = {one["question"] for one in report["runs"][0]["replay"]["generate"]["divergences"]}
    assert named == {"task tales, sample 5, epoch 1, request 1"}
    assert "diverged  task tales, sample 5, epoch 1" in said
    assert held(tmp_path)["verdict"] == "diverged"


def test_a_fault_of_a_later_run(start: Start) -> None:
    """Each run agrees with itself; the second differs from the first."""
    code, report, said = start(model="later", options=("--repeat", "2"), sample=2)
    assert code == 1 and [run["verdict"] for run in report["runs"]] == ["same", "same"], said
    assert len(report["repeats"]) == 12
    assert "diverged  task tales, sample 0, epoch 1, request 1, in run 2" in said


@pytest.mark.parametrize(
    ("words", "model", "draws", "options", "code", "says"),
    [
        (("-T", "most=1"), "hf", "false", (), 5, "no request was seen in another batch"),
        ((), "hf", "true", ("--policy", "off"), 5, "drawn at random"),
        ((), "remote", "", (), 5, "cannot be seen from this process"),
        ((), "remote", "", ("--unobserved", "accept"), 0, "the policy was not in force"),
        ((), "uncovered", "false", (), 2, "aten::cumsum on float32 is refused"),
        ((), "uncovered-alone", "false", (), 2, "aten::cumsum on float32 is refused"),
        (("--model-role", "a"), "no-such-provider", "false", (), 2, "inspect"),
    ],
)
def test_what_cannot_fail_is_said(
    start: Start, words: tuple[str, ...], model: str, draws: str, options: tuple[str, ...], code: int, says: str
) -> None:
    """Batches that did not change, answers drawn at random, batches that cannot be seen; and what is refused."""
    found, _, said = start(*words, model=model, draws=draws, options=options)
    assert (found, says in said) == (code, True), said


def test_by_its_own_command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``inspect eval --model detinfer/...``: passes; a fault ends the process with 1, and the log says which sample."""
    from inspect_ai._cli.main import inspect

    wrapped.register()
    words = ["eval", "task.py", "-M", "device=cpu", "-M", "dtype=float32", "-M", "do_sample=false"]
    words += ["-M", "sample=12", "--max-connections", "12", "--display", "none"]
    inspect.main([*words, "--model", "detinfer/hf/model", "--log-dir", str(tmp_path / "good")], standalone_mode=False)
    logs = [*words, "--log-dir", str(tmp_path / "logs")]
    with pytest.raises(SystemExit) as ended:
        inspect.main([*logs, "--model", "detinfer/batched/model"], standalone_mode=False)
    assert ended.value.code == 1
    assert "detinfer: task tales, sample 5, epoch 1" in capsys.readouterr().err
    account = held(tmp_path)
    assert account["status"] == "error" and "sample 5" in account["error"] and account["verdict"] == "diverged"


def test_commands_that_ask_no_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once."""
    monkeypatch.delenv("INSPECT_EVAL_MODEL", raising=False)
    assert cli.run(["eval", "--", "inspect", "list", "tasks"]) == 2
    assert cli.run(["eval", "--", "inspect", "eval", "task.py"]) == 2
    assert "which model is wrapped" in capsys.readouterr().err
