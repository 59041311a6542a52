"""Deterministic inference: fix the order of every reduction, leave the schedule free.

    with detinfer.deterministic("batch"):
        logits = model(tokens)

The names below are loaded when they are first used: importing detinfer does not import torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from detinfer.errors import DetinferError, RefusedError
    from detinfer.policy import (
        Accepted,
        Active,
        Decision,
        Guarantee,
        Policy,
        Proof,
        Refused,
        deterministic,
        explain,
    )

_HOMES = {
    "Accepted": "detinfer.policy",
    "Active": "detinfer.policy",
    "Decision": "detinfer.policy",
    "DetinferError": "detinfer.errors",
    "Guarantee": "detinfer.policy",
    "Policy": "detinfer.policy",
    "Proof": "detinfer.policy",
    "Refused": "detinfer.policy",
    "RefusedError": "detinfer.errors",
    "deterministic": "detinfer.policy",
    "explain": "detinfer.policy",
}

__all__ = [
    "Accepted",
    "Active",
    "Decision",
    "DetinferError",
    "Guarantee",
    "Policy",
    "Proof",
    "Refused",
    "RefusedError",
    "deterministic",
    "explain",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'detinfer' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
