"""The switches that an engine needs at a policy, and whether the engine that is installed reads them.

Sources: SGLang's ``environ.py`` and ``server_args.py`` (deterministic mode), vLLM's ``init_batch_invariance`` and
``override_envs_for_invariance``, NVIDIA's manuals of NCCL and cuBLAS; each value is one of ``policy.switches`` that does not
contradict a policy of scope ``batch``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from detinfer.errors import UsageError
from detinfer.policy.policy import Policy

ENGINES = ("sglang", "vllm", "transformers")


@dataclass(frozen=True)
class Setting:
    """A variable with the value it needs, and why. ``own`` says that the engine's own code reads it."""

    name: str
    value: str
    why: str
    own: bool = False


_TREE = Setting("NCCL_ALGO", "allreduce:tree", "a ring's order depends on the tensor's size")
_NO_SWITCH = Setting("NCCL_NVLS_ENABLE", "0", "sums inside the switch have no stated order")
_CUBLAS = Setting("CUBLAS_WORKSPACE_CONFIG", ":4096:8", "cuBLAS chooses among its kernels by the workspace it gets")

SETTINGS: dict[str, tuple[Setting, ...]] = {
    "sglang": (
        Setting("SGLANG_ENABLE_DETERMINISTIC_INFERENCE", "1", "SGLang's deterministic mode", True),
        Setting("SGLANG_USE_1STAGE_ALLREDUCE", "1", "one stage at every size, the fused kernel included", True),
        Setting("SGLANG_USE_AITER_AG", "0", "AITER's all-gather is not proved", True),
        _TREE,
        _NO_SWITCH,
        _CUBLAS,
    ),
    "vllm": (
        Setting("VLLM_BATCH_INVARIANT", "1", "vLLM's batch-invariant mode", True),
        Setting("VLLM_ALLREDUCE_USE_SYMM_MEM", "0", "its multicast sum has no stated order", True),
        _TREE,
        _NO_SWITCH,
        _CUBLAS,
    ),
    "transformers": (
        _TREE,
        _NO_SWITCH,
        _CUBLAS,
        Setting("NVIDIA_TF32_OVERRIDE", "0", "the contract computes float32 in float32"),
    ),
}

FLAGS: dict[str, str] = {
    "sglang": "--enable-deterministic-inference",
    "vllm": "",
    "transformers": "",
}
"""What the engine's own command line needs as well."""


def wanted(engine: str, policy: Policy) -> dict[str, str]:
    """The variables that ``engine`` needs at ``policy``; empty at scope ``run``, which asks for nothing."""
    return {setting.name: setting.value for setting in settings(engine, policy)}


def settings(engine: str, policy: Policy) -> tuple[Setting, ...]:
    """The same with their reasons. UsageError for another engine."""
    if engine not in SETTINGS:
        raise UsageError(f"engine {engine!r}: one of {', '.join(ENGINES)}")
    return () if policy.guarantee.scope == "run" else SETTINGS[engine]


@dataclass(frozen=True)
class Checked:
    """A setting beside this machine: what is set now, and whether the installed engine names it (None: not its own)."""

    setting: Setting
    now: str | None
    read: bool | None

    @property
    def note(self) -> str:
        """What is wrong with it; empty where nothing is."""
        if self.read is False:
            return "this version does not read it"
        if self.now is not None and self.now != self.setting.value:
            return f"is {self.now} now"
        return "" if self.now is not None else "is not set"


def check(
    engine: str, policy: Policy, environment: Mapping[str, str] | None = None
) -> tuple[str | None, list[Checked]]:
    """(the installed engine's version, or None; its settings beside the environment and its sources)."""
    variables = os.environ if environment is None else environment
    version, source = installed(engine)
    found = []
    for setting in settings(engine, policy):
        read = setting.name in source if setting.own and version is not None else None
        found.append(Checked(setting, variables.get(setting.name), read))
    return version, found


def installed(engine: str) -> tuple[str | None, str]:
    """(version, all its Python sources as one text) of an installed engine; nothing of it is imported."""
    try:
        distribution = metadata.distribution(engine)
    except metadata.PackageNotFoundError:
        return None, ""
    if not any(setting.own for setting in SETTINGS[engine]):
        return distribution.version, ""
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or () if file.suffix == ".py"]
    return distribution.version, "\n".join(
        file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()
    )
