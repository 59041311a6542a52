"""Turn prompts and a target into requests, and the manifest's account of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from detinfer import bits
from detinfer.errors import UsageError
from detinfer.goldens import tree
from detinfer.goldens.runner import Request, module_requests
from detinfer.models.prompts import prompts, read_prompts
from detinfer.policy import Policy
from detinfer.policy.policy import from_json


def prepare(
    target: Any, file: Path | None, *, count: int, length: int, decode_steps: int, seed: int
) -> tuple[list[Request], dict[str, Any]]:
    """Requests of a target and the ``inputs`` entry of its manifest."""
    if target.kind != "causal_lm":
        requests = module_requests(target)
        described = [tree.map_tensors(r.arguments, lambda _, t: bits.digest(t)) for r in requests if r.arguments]
        entry: dict[str, Any] = {"seed": seed, "prompts": [], "decode_steps": 0, "requests": described}
        return requests, {**entry, "digest": _digest(entry)}
    if count < 1 or length < 1 or decode_steps < 0:
        raise UsageError("--n-prompts and --length are 1 or more, --decode-steps is 0 or more")
    if file is None:
        chosen = prompts(target, count=count, length=length, seed=seed)
    else:
        chosen = prompts(target, read_prompts(file), seed=seed)  # they keep their own lengths
    entry = {
        "seed": seed,
        "prompts": [{"text": prompt.text, "tokens": list(prompt.tokens)} for prompt in chosen],
        "decode_steps": decode_steps,
        "requests": [],
    }
    requests = [Request(tokens=tuple(prompt.tokens), steps=decode_steps + 1) for prompt in chosen]
    return requests, {**entry, "digest": _digest(entry)}


def prepare_again(target: Any) -> list[Request]:
    """A module's requests as its factory gives them now; a language model's stand in the golden."""
    return [] if target.kind == "causal_lm" else module_requests(target)


def policy_of(golden: Any) -> Policy:
    """The policy that a golden was recorded under."""
    return from_json(golden.manifest.policy)


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
