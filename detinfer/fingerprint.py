"""What decides bits on this machine, as one short string and the JSON behind it.

Two runs with the same fingerprint were under the same policy, made the same decisions, on the same proofs, in the same
environment. It says nothing about a model or a task: whoever writes results adds digests of those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import detinfer
from detinfer import environment, native
from detinfer.errors import GoldenError
from detinfer.native import Loaded
from detinfer.policy.aiter import explain_aiter
from detinfer.policy.dispatch import explain_dispatch
from detinfer.policy.listing import explain
from detinfer.policy.listing_collectives import explain_collectives
from detinfer.policy.policy import Accepted, Decision, Policy

SCHEMA = 1
ENVIRONMENT = (*environment.STALE_FIELDS, "native")
"""The fields of an environment that are in it: those that make a golden stale, and the instruction set of detinfer's own
kernels, since each level is proved for itself. The version of Python, the host and the number of threads are not."""


@dataclass(frozen=True)
class Fingerprint:
    """``fields`` are plain JSON values: ``detinfer``, ``policy``, ``environment`` and ``decisions``."""

    fields: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the fields as JSON with sorted keys."""
        text = json.dumps(self.fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        """``di1-batch-0123456789abcdef``: the schema, the scope, the first 64 bits of the digest."""
        return f"di{SCHEMA}-{self.fields['policy']['scope']}-{self.digest[:16]}"

    def to_json(self) -> dict[str, Any]:
        """The string and the fields, to be read back by ``from_json``."""
        return {"fingerprint": str(self), **self.fields}


def capture(
    policy: Policy, device: torch.device | str | None = None, libraries: Sequence[str] = ("transformers",)
) -> Fingerprint:
    """The fingerprint of this process under ``policy``; makes every proof that has not been made yet (seconds).

    ``device`` is where the model runs: its GPU and driver are in it, and without one those of the first GPU, if any.
    ``libraries`` are the packages whose code a model runs.
    """
    state = native.load()
    where = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    here = environment.capture(native.isa() if isinstance(state, Loaded) else "none", libraries, where)
    decisions = [*explain(policy), *explain_collectives(policy), *explain_dispatch(), *explain_aiter()]
    return of(policy, here, decisions)


def of(policy: Policy, here: environment.Environment, decisions: list[Decision]) -> Fingerprint:
    """The fingerprint of these values."""
    found = here.to_json()
    rows = sorted({_row(decision) for decision in decisions}, key=str)
    return Fingerprint(
        {
            "detinfer": detinfer.__version__,
            "policy": policy.to_json(),
            "environment": {name: found[name] for name in ENVIRONMENT if name in found},
            "decisions": [dict(zip(_COLUMNS, row, strict=True)) for row in rows],
        }
    )


_COLUMNS = ("op", "accepted", "path", "subject", "proof", "portable", "reason")


def _row(decision: Decision) -> tuple[Any, ...]:
    """A decision without its wording where it is accepted: the reason of a refusal is all that there is to say."""
    if not isinstance(decision, Accepted):
        return decision.op, False, decision.path, "", "", False, decision.reason
    proof = decision.proof
    subject, digest = (proof.subject, proof.digest) if proof else ("", "")
    return decision.op, True, decision.path, subject, digest, decision.portable, decision.reason


def from_json(held: object, where: str = "fingerprint") -> Fingerprint:
    """What ``Fingerprint.to_json`` gave. GoldenError where it is none, or its string is not that of its fields."""
    keys = ("detinfer", "policy", "environment", "decisions")
    if not isinstance(held, dict) or any(key not in held for key in keys):
        raise GoldenError(f"{where}: not a fingerprint: it has {', '.join(keys)}")
    try:
        found = Fingerprint({key: held[key] for key in keys})
        name = str(found)
    except (KeyError, TypeError) as error:
        raise GoldenError(f"{where}: a fingerprint without the scope of its policy") from error
    if held.get("fingerprint", name) != name:
        raise GoldenError(f"{where}: says {held['fingerprint']}, and its fields give {name}: it was changed by hand")
    return found


def read(path: Path) -> Fingerprint:
    """The fingerprint in a file: one of ``detinfer fingerprint show``, or results that hold one anywhere inside."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path}: cannot be read as JSON: {error}") from error
    found = find(held)
    if found is None:
        raise GoldenError(f"{path}: there is no fingerprint in it")
    return from_json(found, str(path))


def find(held: object) -> dict[str, Any] | None:
    """The first object inside ``held`` that is a fingerprint."""
    if isinstance(held, dict):
        if {"fingerprint", "policy", "environment", "decisions"} <= held.keys() and isinstance(
            held["fingerprint"], str
        ):
            return held
        held = list(held.values())
    if isinstance(held, list):
        return next((found for value in held if (found := find(value)) is not None), None)
    return None


def differences(a: Fingerprint, b: Fingerprint) -> list[tuple[str, str, str]]:
    """(field, its value in ``a``, in ``b``) of everything that differs; a decision is named by operation and proof."""
    left, right = _flat(a.fields), _flat(b.fields)
    return [
        (name, left.get(name, "absent"), right.get(name, "absent"))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def _flat(fields: dict[str, Any]) -> dict[str, str]:
    found = {"detinfer": str(fields["detinfer"])}
    for group in ("policy", "environment"):
        for name, value in fields[group].items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for key, one in parts:
                found[f"{group}.{name}{'.' if key else ''}{key}"] = (
                    " ".join(map(str, one)) if isinstance(one, list) else str(one)
                )
    for row in fields["decisions"]:
        name = f"decision {row['op']}{' (' + row['subject'] + ')' if row['subject'] else ''}"
        said = f"{'accepted' if row['accepted'] else 'refused'} on {row['path']}, {row['reason']}"
        said += f", proof {row['proof'][:16]}" if row["proof"] else ""
        said += ", portable" if row["portable"] else ""
        found[name] = f"{found[name]}; {said}" if name in found else said
    return found
