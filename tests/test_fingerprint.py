"""The fingerprint: it changes with every field that feeds a decision, and with no other."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import detinfer
from detinfer import cli, environment, fingerprint
from detinfer.environment import Environment
from detinfer.errors import GoldenError
from detinfer.policy.listing import explain
from detinfer.policy.policy import Accepted, Decision, Guarantee, Policy, Proof, Refused

HERE = Environment(
    torch="2.13.0",
    torch_git="abc",
    python="3.11.2",
    system="Linux",
    machine="x86_64",
    libc="glibc 2.36",
    cpu="AuthenticAMD 25 1",
    cpu_features=("avx2", "fma"),
    cpu_capability="AVX2",
    mkl="2024.2",
    onednn="3.7",
    detinfer="0.1.0",
    native="avx2",
    variables={"MKL_CBWR": "AVX2"},
    flags={"mkldnn": "True"},
    libraries={"transformers": "5.23.0"},
    gpu={"name": "H200"},
)
PROOF = Proof("aten::mm float32", "detinfer.reference.matmul", 100, "00ff")
DECISIONS: list[Decision] = [
    Accepted("aten::mm", "csrc/matmul", "canonical order", PROOF, portable=True),
    Refused("aten::cumsum", "torch", "a running sum"),
]
UNFELT = {"python", "detinfer"}
"""Fields of an environment that feed no decision; detinfer's own version stands beside the environment."""


def made(policy: Policy | None = None, here: Environment = HERE, decisions: list[Decision] = DECISIONS) -> str:
    return str(fingerprint.of(policy or Policy(), here, decisions))


@pytest.mark.parametrize("name", [field.name for field in fields(Environment)])
def test_every_field_of_the_environment(name: str) -> None:
    """A change of a field changes the string; of Python's version it does not. In a map, of any entry."""
    value: Any = getattr(HERE, name)
    if isinstance(value, dict):
        changes: list[Any] = [{}, {**value, "another": "1"}, dict.fromkeys(value, "changed")]
    else:
        changes = [(*value, "sse4_1"), value[:1]] if isinstance(value, tuple) else [value + "x"]
    before = fingerprint.of(Policy(), HERE, DECISIONS)
    for change in changes:
        after = fingerprint.of(Policy(), replace(HERE, **{name: change}), DECISIONS)
        named = {
            one.removeprefix("environment.").partition(".")[0] for one, _, _ in fingerprint.differences(before, after)
        }
        assert (str(after) == str(before), named) == (name in UNFELT, set() if name in UNFELT else {name})


def test_the_fields_are_those_that_make_a_golden_stale() -> None:
    """A field that is new to Environment is either in the fingerprint or listed here as unfelt."""
    assert set(fingerprint.ENVIRONMENT) | UNFELT == {field.name for field in fields(Environment)}


@pytest.mark.parametrize(
    "policy",
    [
        Policy(Guarantee("run")),
        Policy(Guarantee(place="portable")),
        Policy(allow=("aten::cumsum",)),
        Policy(uncovered="trust"),
        Policy(reductions="separate"),
    ],
    ids=str,
)
def test_every_field_of_the_policy(policy: Policy) -> None:
    """Scope, place, allow, uncovered, reductions; what differs is named."""
    assert made(policy) != made()
    changed = {name for name, value in policy.to_json().items() if value != Policy().to_json().get(name)}
    a, b = (fingerprint.of(one, HERE, DECISIONS) for one in (Policy(), policy))
    assert {name.split(".")[1] for name, _, _ in fingerprint.differences(a, b)} == changed and len(changed) == 1


def test_the_groups_of_scope_tp() -> None:
    """A field that other scopes do not have."""
    a, b = (fingerprint.of(Policy(Guarantee("tp"), groups=groups), HERE, DECISIONS) for groups in (2, 4))
    assert str(a) != str(b)
    assert fingerprint.differences(a, b) == [("policy.groups", "2", "4")]


def test_no_field_of_the_policy_is_left_out() -> None:
    """A field that is new to Policy, Guarantee, Accepted or Proof is one that is tried above."""
    assert {one.name for one in fields(Policy)} == {"guarantee", "allow", "uncovered", "reductions", "groups"}
    assert {one.name for one in fields(Guarantee)} == {"scope", "place"}
    assert {one.name for one in fields(Accepted)} == {"op", "path", "reason", "proof", "portable"}
    assert {one.name for one in fields(Proof)} == {"subject", "against", "cases", "digest"}


@pytest.mark.parametrize(
    "decision",
    [
        replace(DECISIONS[0], op="aten::bmm"),
        replace(DECISIONS[0], path="torch"),
        replace(DECISIONS[0], reason="allowed by the policy"),
        replace(DECISIONS[0], portable=False),
        replace(DECISIONS[0], proof=None),
        replace(DECISIONS[0], proof=replace(PROOF, digest="00fe")),
        replace(DECISIONS[0], proof=replace(PROOF, subject="aten::mm bfloat16")),
        Refused("aten::mm", "csrc/matmul", "its proof failed"),
    ],
    ids=str,
)
def test_every_field_of_a_decision(decision: Decision) -> None:
    """Operation, path, reason, proof and portability, each named; the order in which decisions are listed is none of it."""
    assert made(decisions=[decision, DECISIONS[1]]) != made()
    a, b = fingerprint.of(Policy(), HERE, DECISIONS), fingerprint.of(Policy(), HERE, [decision, DECISIONS[1]])
    named = [name for name, _, _ in fingerprint.differences(a, b)]
    assert named and all(name.startswith(("decision aten::mm", f"decision {decision.op}")) for name in named)
    assert made(decisions=DECISIONS[::-1]) == made()


def test_the_version_of_detinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another detinfer is another fingerprint."""
    before = made()
    monkeypatch.setattr(detinfer, "__version__", "9.9.9")
    assert made() != before


def test_what_differs_is_named() -> None:
    """Field by field: maps by entry, a decision by its operation and what was proved."""
    there = replace(HERE, mkl="2025.0", flags={"mkldnn": "False"}, gpu={})
    worse = [replace(DECISIONS[0], proof=replace(PROOF, digest="1234")), DECISIONS[1]]
    a = fingerprint.of(Policy(), HERE, DECISIONS)
    b = fingerprint.of(Policy(allow=("aten::cumsum",)), there, worse)
    assert fingerprint.differences(a, a) == []
    found = {name: (one, other) for name, one, other in fingerprint.differences(a, b)}
    assert found["environment.mkl"] == ("2024.2", "2025.0")
    assert found["environment.flags.mkldnn"] == ("True", "False")
    assert found["environment.gpu.name"] == ("H200", "absent")
    assert found["policy.allow"] == ("", "aten::cumsum")
    one, other = found["decision aten::mm (aten::mm float32)"]
    assert "proof 00ff" in one and "proof 1234" in other
    assert len(found) == 5


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: the same twice, another after a flag of torch's, and read back from inside other JSON."""
    few = explain(Policy(), (torch.float32,))[:20]

    def here() -> fingerprint.Fingerprint:
        return fingerprint.of(Policy(), environment.capture("avx2"), few)

    first = here()
    assert first == here()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        changed = here()
    finally:
        torch.set_float32_matmul_precision(before)
    assert [name for name, _, _ in fingerprint.differences(first, changed)] == [
        "environment.flags.float32_matmul_precision"
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"config": {"inside": [{"x": 1}, first.to_json()]}}))
    assert fingerprint.read(file) == first
    assert str(first).startswith("di1-batch-") and len(str(first)) == len("di1-batch-") + 16


def test_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 and the same, 1 and what differs, 4 for a file without one or one that was changed by hand."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    held = fingerprint.of(Policy(), HERE, DECISIONS).to_json()
    a.write_text(json.dumps(held))
    b.write_text(json.dumps(fingerprint.of(Policy(), replace(HERE, torch="2.14.0"), DECISIONS).to_json()))
    assert cli.run(["fingerprint", "explain", str(a), str(a)]) == 0
    assert cli.run(["fingerprint", "explain", str(a), str(b)]) == 1
    assert "environment.torch\n  a  2.13.0\n  b  2.14.0" in capsys.readouterr().out
    for text, said in (("{}", "no fingerprint"), ("{", "JSON")):
        b.write_text(text)
        assert cli.run(["fingerprint", "explain", str(a), str(b)]) == 4
        assert said in capsys.readouterr().err
    b.write_text(json.dumps({**held, "detinfer": "0.2.0"}))
    assert cli.run(["fingerprint", "explain", str(a), str(b)]) == 4
    assert "changed by hand" in capsys.readouterr().err
    with pytest.raises(GoldenError, match="not a fingerprint"):
        fingerprint.from_json({"policy": {}})
