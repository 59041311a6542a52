"""The engines' switches: what contradicts a policy is an error that names it; retired names are answered."""

from __future__ import annotations

import re

import pytest

from detinfer.errors import UsageError
from detinfer.policy.policy import Guarantee, Policy
from detinfer.policy.switches import RETIRED, SWITCHES, check_switches, read_switches, use_1stage

TABLE = [
    # variable, values that agree with scope batch, values that contradict it
    ("SGLANG_USE_1STAGE_ALLREDUCE", ("1", "true"), ("0", "False")),
    ("SGLANG_ENABLE_DETERMINISTIC_INFERENCE", ("1",), ("0",)),
    ("SGLANG_USE_AITER_AR", ("0", "1"), ()),
    ("SGLANG_USE_AITER_AG", ("0", "1"), ()),
    ("AITER_AR_1STAGE", ("1",), ("0",)),
    ("AITER_CUSTOM_AR_MAX_SIZE", ("0", "67108864"), ()),
    ("AITER_QUICK_REDUCE_QUANTIZATION", ("NONE", ""), ("FP8", "INT4")),
    ("VLLM_BATCH_INVARIANT", ("1",), ("0",)),
    ("VLLM_ALLREDUCE_USE_SYMM_MEM", ("0",), ("1",)),
    ("NCCL_ALGO", ("allreduce:tree", "Tree", "ring,tree;allreduce:tree", "allgather:ring"), ("ring", "Ring,Tree")),
    ("NCCL_ALGO", (), ("allreduce:ring", "tree;allreduce:nvls", "allreduce:tree,ring")),
    ("NCCL_NVLS_ENABLE", ("0",), ("1",)),
    ("CUBLASLT_WORKSPACE_SIZE", ("0", "8192"), ()),
]


@pytest.mark.parametrize(("name", "agree", "contradict"), TABLE)
def test_switches(name: str, agree: tuple[str, ...], contradict: tuple[str, ...]) -> None:
    """Each is read and reported; a contradiction names the variable, the value and the remedy."""
    for value in agree:
        (read,) = check_switches(Policy(), {name: value, "OTHER": "1"})
        assert (read.switch.name, read.value, read.contradiction) == (name, value, "")
    for value in contradict:
        with pytest.raises(UsageError, match=re.escape(f"{name}={value}: ")) as caught:
            check_switches(Policy(), {name: value})
        assert "set it to" in str(caught.value) or "unset it" in str(caught.value)
        assert check_switches(Policy(Guarantee("run")), {name: value})  # says nothing of a batch


def test_all_contradictions_are_named_at_once() -> None:
    """So that one run is enough to mend them; the environment is left as it is."""
    environment = {"NCCL_ALGO": "ring", "AITER_AR_1STAGE": "0", "SGLANG_USE_AITER_AG": "1"}
    before = dict(environment)
    with pytest.raises(UsageError, match=r"AITER_AR_1STAGE=0.*NCCL_ALGO=ring"):
        check_switches(Policy(), environment)
    assert environment == before
    assert len(read_switches(Policy(), environment)) == 3


@pytest.mark.parametrize("name", RETIRED)
def test_retired_names_are_answered(name: str) -> None:
    """With the name of today."""
    with pytest.raises(UsageError, match=f"{name}=1: .*SGLANG_USE_1STAGE_ALLREDUCE now"):
        check_switches(Policy(), {name: "1"})
    assert name not in {switch.name for switch in SWITCHES}


def test_one_stage_switch_wins() -> None:
    """Set, it decides; unset, the deterministic mode does; else the size."""
    one, mode = "SGLANG_USE_1STAGE_ALLREDUCE", "SGLANG_ENABLE_DETERMINISTIC_INFERENCE"
    assert use_1stage({one: "0", mode: "1"}) is False
    assert use_1stage({one: "1", mode: "0"}) is True
    assert use_1stage({mode: "1"}) is True
    assert use_1stage({}) is None
    with pytest.raises(UsageError, match=f"{one}=maybe"):
        use_1stage({one: "maybe"})
