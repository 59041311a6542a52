"""A policy from code, pyproject.toml and the environment: the strongest place wins field by field, and is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer.cli import options, run
from detinfer.errors import UsageError
from detinfer.policy import Guarantee, Policy, deterministic
from detinfer.policy.configured import configured


def project(folder: Path, text: str) -> Path:
    """A project's folder with this in its pyproject.toml, and a folder below it."""
    (folder / "pyproject.toml").write_text(f"[project]\nname = 'x'\n{text}")
    below = folder / "a/b"
    below.mkdir(parents=True)
    return below


def test_order_of_strength(tmp_path: Path) -> None:
    """Code, then the file, then the environment; what nobody gives is a default."""
    below = project(tmp_path, '[tool.detinfer]\nscope = "run"\nallow = ["aten::topk", "aten::cumsum"]\n')
    variables = {"DETINFER_SCOPE": "batch", "DETINFER_PLACE": "portable", "DETINFER_ALLOW": "aten::sort"}
    policy, origins = configured(folder=below, environment=variables, uncovered="trust", place=None)
    assert policy == Policy(Guarantee("run", "portable"), ("aten::cumsum", "aten::topk"), "trust")
    file = str(tmp_path / "pyproject.toml")
    assert origins == {"scope": file, "allow": file, "place": "DETINFER_PLACE", "uncovered": "code"}
    assert configured(folder=below, environment=variables, scope="batch")[0].guarantee.scope == "batch"
    assert configured(folder=tmp_path / "none", environment={})[0].guarantee.scope == "run"


def test_environment_alone(tmp_path: Path) -> None:
    """A pyproject.toml without a table says nothing."""
    below = project(tmp_path, "")
    policy, _ = configured(folder=below, environment={"DETINFER_ALLOW": "aten::sort, aten::topk,"})
    assert policy == Policy(allow=("aten::sort", "aten::topk"))
    assert configured(folder=below, environment={})[0] == Policy()


@pytest.mark.parametrize(
    ("text", "variables", "parts"),
    [
        ('scope = "row"', {}, ("pyproject.toml", "'row'", "run, batch, tp")),
        ("scpe = 1", {}, ("pyproject.toml", "no 'scpe'", "scope, place, allow, uncovered")),
        ('allow = "aten::sort"', {}, ("pyproject.toml", "list of operations")),
        ('allow = ["sort"]', {}, ("pyproject.toml", "'sort'", "aten::name")),
        ("scope = [1]", {}, ("pyproject.toml", "scope")),
        ("scope = ", {}, ("pyproject.toml",)),
        ("", {"DETINFER_PLACE": "there"}, ("DETINFER_PLACE", "'there'", "portable")),
        ("", {"DETINFER_UNCOVERED": "maybe"}, ("DETINFER_UNCOVERED", "'maybe'")),
    ],
)
def test_what_cannot_be_names_its_place(
    tmp_path: Path, text: str, variables: dict[str, str], parts: tuple[str, ...]
) -> None:
    """The file or the variable, the value, and what can be."""
    below = project(tmp_path, f"[tool.detinfer]\n{text}\n")
    with pytest.raises(UsageError) as caught:
        configured(folder=below, environment=variables)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_deterministic_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    """``deterministic()`` without a policy is under the project's."""
    monkeypatch.chdir(project(tmp_path, '[tool.detinfer]\nuncovered = "trust"\n'))
    monkeypatch.setenv("DETINFER_SCOPE", "run")
    with deterministic(families=fake.families) as active:
        assert active.policy == Policy(Guarantee("run"), uncovered="trust")


def test_a_switch_against_the_policy_is_refused_at_entry(monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    """By name, before anything is installed."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    with pytest.raises(UsageError, match="VLLM_BATCH_INVARIANT=0"):
        deterministic("batch", families=fake.families).__enter__()
    with deterministic("run", families=fake.families):
        pass


def test_record_takes_the_projects_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its options do not say comes from pyproject.toml and the environment."""
    monkeypatch.chdir(project(tmp_path, '[tool.detinfer]\nscope = "run"\nallow = ["aten::cumsum"]\n'))
    assert options.policy(None, ()) == Policy(Guarantee("run"), ("aten::cumsum",))
    assert options.policy("batch", ("aten::topk",)) == Policy(Guarantee("batch"), ("aten::topk",))


def test_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every operation and path with its decision, the collectives' proofs between three ranks included."""
    monkeypatch.chdir(project(tmp_path, '[tool.detinfer]\nallow = ["aten::cumsum"]\n'))
    assert run(["policy", "explain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policy"]["allow"] == ["aten::cumsum"] and found["origins"]["allow"].endswith("pyproject.toml")
    rows = [(row["op"], row["path"], row["accepted"]) for row in found["decisions"]]
    assert ("aten::mm", "csrc/matmul", True) in rows and ("aten::cumsum", "torch", True) in rows
    for path, accepted in (
        ("csrc/all_reduce", True),
        ("ordered_gather", True),
        ("torch", False),
        ("cuda/all_reduce", torch.cuda.is_available()),
    ):
        assert ("c10d::allreduce_", path, accepted) in rows
        assert ("c10d::allreduce_", path, not accepted) not in rows
    proofs = [row["proof"] for row in found["decisions"] if row["op"] == "c10d::allreduce_" and row["accepted"]]
    assert {proof["subject"] for proof in proofs} >= {f"all_reduce {op} bfloat16 3 ranks" for op in ("sum", "max")}
    assert all(row["reason"] for row in found["decisions"])
    assert run(["policy", "explain", "--json", "--dtype", "bfloat16"]) == 0
    of_one = json.loads(capsys.readouterr().out)["decisions"]
    sums = {row["proof"]["subject"] for row in of_one if row["op"] == "c10d::allreduce_" and row["accepted"]}
    assert sums == {proof["subject"] for proof in proofs if " bfloat16 " in proof["subject"]}
    assert ("aten::mm", "csrc/matmul") in {(row["op"], row["path"]) for row in of_one}
    monkeypatch.setenv("NCCL_ALGO", "ring")
    assert run(["policy", "explain"]) == 0
    text = capsys.readouterr().out
    assert "NCCL_ALGO=ring: " in text and "set it to allreduce:tree" in text
    assert run(["policy", "explain", "--policy", "rows"]) == 2
    assert "'rows'" in capsys.readouterr().err
