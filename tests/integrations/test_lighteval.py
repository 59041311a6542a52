"""lighteval, the real package, on tasks and a model made here: the same bits, replays, planted faults."""

from __future__ import annotations

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

sys.path.append(str(Path(__file__).parent))
import offline

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lighteval") is None,
        reason="lighteval is not installed here: pip install lighteval 'datasets<5' 'xxhash<4'",
    ),
    pytest.mark.filterwarnings("default"),  # of lighteval and what it imports
]

TASKS = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc

def prompt(line, task_name=None):
    question = f"Q: {{line['question']}} A:"
    choices = [f" {{choice}}" for choice in line["choices"]]
    return Doc(task_name=task_name, query=question, choices=choices, gold_index=line["answer"])

def task(name, metric, size=None):
    return LightevalTaskConfig(
        name=name, prompt_function=prompt, hf_repo="{data}", hf_subset="default", metrics=[metric],
        evaluation_splits=["test"], hf_avail_splits=["test"], generation_size=size, stop_sequence=["\\n"],
    )

TASKS_TABLE = [task("choices", Metrics.loglikelihood_acc), task("tales", Metrics.exact_match, 6)]
"""

FAULTY = '''
import sys
sys.path.append({here!r})
import offline
import lighteval.models.transformers.transformers_model as base

class Batched(base.TransformersModel):
    """Document 5's logits depend on the batch."""

    def __init__(self, config):
        super().__init__(base.TransformersModelConfig.from_args(config.model_name))
        offline.plant(self.model, self.tokenizer.encode({question!r}, add_special_tokens=False), most=4)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the model, the tasks and a faulty model's file."""
    folder = tmp_path_factory.mktemp("lighteval")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, str(folder / "hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        gradients = torch.is_grad_enabled()
        from lighteval.tasks.registry import Registry

        # Its own task files: one of them downloads data while it is imported.
        patch.setattr(Registry, "_load_from_files", staticmethod(lambda files, module: {}))
        patch.setattr(Registry, "_load_from_subdirs", staticmethod(lambda folders: {}))
        offline.write_model(folder / "model")
        documents = offline.write_tasks(folder / "tasks") / "documents.jsonl"
        (folder / "data").mkdir()
        (folder / "data/test.jsonl").write_bytes(documents.read_bytes())
        question = offline.question(folder / "tasks", 5)
        (folder / "tasks.py").write_text(TASKS.format(data=folder / "data"))
        (folder / "faulty.py").write_text(FAULTY.format(here=str(Path(__file__).parent), question=question))
        yield folder
        torch.set_grad_enabled(gradients)  # lighteval switches them off for the process


Start = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def start(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Start:
    """``detinfer eval`` of lighteval in the test's folder: exit code, report, and what it said."""

    def run(
        *words: str, options: tuple[str, ...] = (), batch: int = 32, tasks: str = "choices|0", file: str = ""
    ) -> Any:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        model = f"model_name={place / 'model'},dtype=float32,batch_size={batch}"
        backend = ("custom", model, str(place / file)) if file else ("accelerate", model)
        code = cli.run(
            [
                *("eval", "--report", str(report), "--sample", "4", *options, "--", "lighteval", *backend, tasks),
                *("--custom-tasks", str(place / "tasks.py"), "--output-dir", str(tmp_path / "out"), *words),
            ]
        )
        return code, json.loads(report.read_text()) if report.exists() else {}, capsys.readouterr().err

    return run


def test_the_same_bits_at_every_batch_size(start: Start) -> None:
    """Batches of 1 and 8 documents: the same answers under the policy, others without."""
    found: dict[str, set[str]] = {}
    for policy in ("batch", "off"):
        for batch in (1, 32):
            code, report, said = start(options=("--policy", policy), batch=batch)
            assert code == (0 if policy == "batch" else 1), said
            found.setdefault(policy, set()).add(report["runs"][0]["digests"]["results"])
    assert (len(found["batch"]), len(found["off"])) == (1, 2)


def test_what_the_results_file_holds(start: Start, tmp_path: Path) -> None:
    """The account, and a fingerprint that ``explain`` reads; both kinds of requests; details are written as ever."""
    code, report, said = start("--save-details", tasks="choices|0,tales|0")
    assert code == 0, said
    (file,) = (tmp_path / "out/results").rglob("results_*.json")
    held = json.loads(file.read_text())["config_general"]["model_config"]["detinfer"]
    assert held == report["runs"][0] and held["verdict"] == "same"
    assert {kind: one["changed"] for kind, one in held["replay"].items()} == {"greedy_until": 4, "loglikelihood": 4}
    assert held["operations"]["allowed"] == ["aten::random_"]
    assert str(fingerprint.read(file)) == held["system_fingerprint"]["fingerprint"]
    assert "lighteval" in fingerprint.read(file).fields["environment"]["libraries"]
    assert len(list((tmp_path / "out/details").rglob("*.parquet"))) == 2


def test_a_planted_fault_is_named(start: Start, tmp_path: Path) -> None:
    """One document's logits depend on the batch: exit code 1, that document named, the results written and marked."""
    code, report, said = start(options=("--sample", "12"), file="faulty.py")
    assert code == 1, said
    named = {one["question"] for one in report["runs"][0]["replay"]["loglikelihood"]["divergences"]}
    assert named == {"task choices|0, document 5, loglikelihood"}
    assert "diverged  task choices|0, document 5" in said
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["config_general"]["model_config"]["detinfer"]["verdict"] == "diverged"


def test_answers_of_earlier_runs_are_not_taken(start: Start) -> None:
    """lighteval's cache is off: the second run asks the model everything again; runs in one process agree."""
    for _ in range(2):
        code, report, said = start("--max-samples", "3", options=("--repeat", "2"))
        assert code == 0 and len(report["runs"]) == 2, said
        assert [run["replay"]["loglikelihood"]["changed"] for run in report["runs"]] == [3, 3]


@pytest.mark.parametrize(
    ("words", "tasks", "options", "code", "says"),
    [
        (("--max-samples", "1"), "tales|0", (), 5, "no request was seen in another batch"),
        (("--max-samples", "2"), "no-such-task|0", (), 2, "lighteval failed"),
        ((), "choices|0", ("--policy", "no-such-scope"), 2, "no-such-scope"),
    ],
)
def test_what_cannot_fail_is_said(
    start: Start, words: tuple[str, ...], tasks: str, options: tuple[str, ...], code: int, says: str
) -> None:
    """Too few documents for another batch; what lighteval refuses; a policy that cannot be."""
    found, _, said = start(*words, tasks=tasks, options=options)
    assert (found, says in said) == (code, True), said


def test_by_its_own_command(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``lighteval custom`` with the file in detinfer: passes, and raises where a document's bits depend on the batch."""
    import lighteval.models.transformers.transformers_model as base
    import typer
    from lighteval.__main__ import app

    from detinfer.integrations import lighteval_model

    command: Any = typer.main.get_command(app)
    words = ["custom", f"model_name={place / 'model'},dtype=float32,batch_size=32", lighteval_model.__file__]
    words += ["choices|0", "--custom-tasks", str(place / "tasks.py"), "--output-dir", str(tmp_path)]
    command.main(args=words, standalone_mode=False)
    (file,) = tmp_path.rglob("results_*.json")
    assert fingerprint.read(file).fields["policy"]["scope"] == "batch"
    made = base.TransformersModel._create_auto_model

    def faulty(self: Any) -> Any:
        model = made(self)
        offline.plant(model, self.tokenizer.encode(offline.question(place / "tasks", 5)), most=4)
        return model

    monkeypatch.setattr(base.TransformersModel, "_create_auto_model", faulty)
    with pytest.raises(Diverged, match=r"task choices\|0, document 5"):
        command.main(args=words, standalone_mode=False)
