"""The engines' switches at a policy, held against an engine that is installed (here: a distribution that the test makes)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from detinfer.errors import UsageError
from detinfer.policy import Guarantee, Policy
from detinfer.policy.engines import ENGINES, SETTINGS, check, settings
from detinfer.policy.switches import SWITCHES, read_switches


def test_every_setting_agrees_with_the_policy() -> None:
    """No value is one that the policy would refuse, and each of an engine's own is a switch that is known."""
    known = {switch.name for switch in SWITCHES}
    for engine in ENGINES:
        values = {setting.name: setting.value for setting in SETTINGS[engine]}
        assert [read for read in read_switches(Policy(), values) if read.contradiction] == []
        assert {setting.name for setting in SETTINGS[engine] if setting.own} <= known
    assert settings("sglang", Policy(Guarantee("run"))) == ()
    with pytest.raises(UsageError, match="one of sglang, vllm, transformers"):
        settings("megatron", Policy())


@pytest.mark.parametrize("reads", ["all", "one"])
def test_an_installed_engine(tmp_path: Path, reads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version, and which switches its sources name; the environment's values beside them. Nothing is imported."""
    names = [setting.name for setting in SETTINGS["sglang"] if setting.own]
    named = names if reads == "all" else names[:1]
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/envs.py").write_text("raise RuntimeError('imported')\n" + "\n".join(named))
    information = tmp_path / "sglang-0.5.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.9\n")
    (information / "RECORD").write_text("sglang/envs.py,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    version, found = check("sglang", Policy(), {names[0]: "1", "NCCL_ALGO": "allreduce:tree,ring"})
    notes = {one.setting.name: one.note for one in found}
    assert version == "0.5.9"
    assert notes[names[0]] == "" and notes["NCCL_ALGO"] == "is allreduce:tree,ring now"
    assert notes[names[1]] == ("is not set" if reads == "all" else "this version does not read it")
    assert notes["NCCL_NVLS_ENABLE"] == "is not set"


def test_an_engine_that_is_not_installed() -> None:
    """Its switches are given without a version."""
    version, found = check("sglang", Policy(), {})
    assert version is None and {one.note for one in found} == {"is not set"}
