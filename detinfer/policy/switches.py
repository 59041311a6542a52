"""The engines' environment switches: read, reported, and held against a policy. Nothing is overwritten.

Sources: SGLang's ``environ.py`` and pull requests 15340, 21986 and 25093; AITER's ``custom_all_reduce.py``; vLLM's
``VLLM_BATCH_INVARIANT``; NCCL's and cuBLAS's manuals.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from detinfer.errors import UsageError
from detinfer.policy.policy import Policy

Engine = Literal["sglang", "aiter", "vllm", "nccl", "cublas"]

_TRUE = frozenset({"1", "true", "yes", "y", "on", "t"})
_FALSE = frozenset({"0", "false", "no", "n", "off", "f", ""})


@dataclass(frozen=True)
class Switch:
    """A variable: whose it is, what it does, and which values contradict a policy, with the reason and the remedy."""

    name: str
    engine: Engine
    meaning: str
    contradicts: Literal["", "false", "true", "not tree", "set"] = ""
    why: str = ""


SWITCHES = (
    Switch(
        "SGLANG_USE_1STAGE_ALLREDUCE",
        "sglang",
        "forces the 1-stage all-reduce or forbids it; set, it wins over everything else",
        "false",
        "without it the kernel depends on the tensor's size: set it to 1, or unset it",
    ),
    Switch(
        "SGLANG_ENABLE_DETERMINISTIC_INFERENCE",
        "sglang",
        "SGLang's deterministic mode; it chooses 1-stage for plain all-reduce, and no longer for the fused kernel",
        "false",
        "it switches the deterministic mode off: set it to 1, or unset it",
    ),
    Switch("SGLANG_USE_AITER_AR", "sglang", "AITER's all-reduce in place of SGLang's, where 1-stage is not forced"),
    Switch("SGLANG_USE_AITER_AG", "sglang", "AITER's all-gather: a copy, refused until it is proved"),
    Switch(
        "AITER_AR_1STAGE",
        "aiter",
        "forces 1-stage of the fused kernel or forbids it",
        "false",
        "two stages have another tree: set it to 1, or unset it",
    ),
    Switch("AITER_AR_1STAGE_MAX_KB", "aiter", "up to where the fused kernel takes one stage (compared with bytes)"),
    Switch("AITER_CUSTOM_AR_MAX_SIZE", "aiter", "bytes up to which AITER's all-reduce is used; 0: never"),
    Switch("AITER_CUSTOM_AR_MIN_SIZE", "aiter", "bytes above which AITER's all-reduce is used"),
    Switch(
        "AITER_QUICK_REDUCE_QUANTIZATION",
        "aiter",
        "quick reduce with a quantised payload",
        "set",
        "it rounds the ranks' terms before they are added: unset it, or set it to NONE",
    ),
    Switch(
        "VLLM_BATCH_INVARIANT",
        "vllm",
        "vLLM's batch-invariant mode",
        "false",
        "it switches the batch-invariant mode off: set it to 1, or unset it",
    ),
    Switch(
        "VLLM_ALLREDUCE_USE_SYMM_MEM",
        "vllm",
        "all-reduce by symmetric memory",
        "true",
        "its multicast sum has no stated order: set it to 0",
    ),
    Switch(
        "NCCL_ALGO",
        "nccl",
        "NCCL's algorithm",
        "not tree",
        "a ring adds in an order that depends on the tensor's size: set it to allreduce:tree, or unset it",
    ),
    Switch("NCCL_PROTO", "nccl", "NCCL's protocol"),
    Switch(
        "NCCL_NVLS_ENABLE",
        "nccl",
        "sums inside the switch",
        "true",
        "the switch's order is not stated: set it to 0",
    ),
    Switch("CUBLASLT_WORKSPACE_SIZE", "cublas", "KiB that cuBLASLt may use; a workspace allows split-K"),
    Switch("CUBLAS_WORKSPACE_CONFIG", "cublas", "cuBLAS's workspaces"),
)

RETIRED = {
    "SGLANG_USE_DETERMINISTIC_ALLREDUCE": "SGLANG_USE_1STAGE_ALLREDUCE",
    "SGLANG_FORCE_1STAGE_ALLREDUCE": "SGLANG_USE_1STAGE_ALLREDUCE",
    "SGLANG_PREFER_CUSTOM_ALLREDUCE_FOR_DETERMINISM": "SGLANG_USE_1STAGE_ALLREDUCE",
}
"""Names that SGLang's pull request 15340 had on the way, and the one that it was merged with."""


@dataclass(frozen=True)
class Read:
    """A switch that is set: its value, and how it contradicts the policy (empty: it does not)."""

    switch: Switch
    value: str
    contradiction: str = ""


def read_switches(policy: Policy, environment: Mapping[str, str] | None = None) -> list[Read]:
    """The switches that are set, in the order of SWITCHES, each held against ``policy``."""
    variables = os.environ if environment is None else environment
    return [
        Read(switch, variables[switch.name], _contradiction(switch, variables[switch.name], policy))
        for switch in SWITCHES
        if switch.name in variables
    ]


def check_switches(policy: Policy, environment: Mapping[str, str] | None = None) -> list[Read]:
    """The same; raises UsageError naming every variable that contradicts the policy or is no longer read."""
    variables = os.environ if environment is None else environment
    found = read_switches(policy, variables)
    wrong = [read.contradiction for read in found if read.contradiction]
    wrong += [
        f"{name}={variables[name]}: no version of SGLang reads this name any more; it is {present} now"
        for name, present in RETIRED.items()
        if name in variables
    ]
    if wrong:
        raise UsageError("the environment contradicts the policy: " + "; ".join(wrong))
    return found


def use_1stage(environment: Mapping[str, str] | None = None) -> bool | None:
    """What SGLang's switches say of one stage for plain all-reduce; None where neither is set."""
    variables = os.environ if environment is None else environment
    for name in ("SGLANG_USE_1STAGE_ALLREDUCE", "SGLANG_ENABLE_DETERMINISTIC_INFERENCE"):
        if name in variables:
            return _boolean(name, variables[name])
    return None


def _boolean(name: str, value: str) -> bool:
    lowered = value.strip().lower()
    if lowered not in _TRUE | _FALSE:
        raise UsageError(f"{name}={value}: it is 0 or 1")
    return lowered in _TRUE


def _contradiction(switch: Switch, value: str, policy: Policy) -> str:
    if not switch.contradicts or policy.guarantee.scope == "run":
        return ""
    if switch.contradicts == "set":
        against = value.strip().upper() not in ("", "NONE")
    elif switch.contradicts == "not tree":
        against = any(part and part != "tree" for part in _all_reduce_algorithms(value))
    else:
        against = _boolean(switch.name, value) is (switch.contradicts == "true")
    return f"{switch.name}={value}: {switch.why}" if against else ""


def _all_reduce_algorithms(value: str) -> list[str]:
    """What NCCL_ALGO allows for all-reduce: ``allreduce:tree;...`` wins over a list for all collectives."""
    general: list[str] = []
    for part in value.lower().split(";"):
        function, colon, algorithms = part.rpartition(":")
        names = [name.strip() for name in algorithms.split(",")]
        if colon and function.strip() == "allreduce":
            return names
        if not colon:
            general = names
    return general
