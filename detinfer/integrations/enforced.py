"""What every wrapped model of an evaluation library has: the terms, the policy in force, what was found, its account."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from detinfer import bits, fingerprint
from detinfer.errors import Diverged, UsageError
from detinfer.integrations.replay import Answer, Plan, Question, Report, as_bytes, same
from detinfer.policy import Accepted, Decision, deterministic
from detinfer.policy.configured import configured

made: list[Account] | None = None
"""Where somebody keeps accounts (``detinfer eval``), that of each wrapper made; a divergence is then theirs to tell."""
defaults: Terms | None = None
"""The terms of ``detinfer eval``, for wrappers whose library has no place for arguments of its own."""


@dataclass(frozen=True)
class Terms:
    """On what terms a model is wrapped.

    ``policy`` is a scope, ``off``, or None for the project's; ``uncovered`` and ``allow`` (a list, or names joined by ``+``)
    as in ``Policy``. ``sample`` requests of each kind are replayed, chosen by ``replay_seed``. ``unobserved="accept"`` lets a
    model pass whose batches cannot be seen (it runs in another process). ``digest_weights=False`` leaves out the
    weights' digest, which reads all of them.

    Raises UsageError for values that make no sense.
    """

    policy: str | None = None
    uncovered: str | None = None
    allow: str | Sequence[str] | None = None
    sample: int = 16
    replay_seed: int = 0
    unobserved: Literal["vacuous", "accept"] = "vacuous"
    digest_weights: bool = True

    def __post_init__(self) -> None:
        if self.unobserved not in ("vacuous", "accept"):
            raise UsageError(f"unobserved={self.unobserved}: vacuous or accept")
        if not isinstance(self.sample, int) or self.sample < 1:
            raise UsageError(f"sample={self.sample}: at least one request is replayed")


@dataclass(frozen=True)
class Subject:
    """The model inside, as far as it can be seen. ``libraries`` are packages whose code makes its answers."""

    module: torch.nn.Module | None
    tokenizer: Any
    device: Any
    libraries: tuple[str, ...]


class Account:
    """What one wrapped model did: its answers, the replays' reports, the decisions of the policy."""

    equal: Callable[[Answer, Answer], bool] = staticmethod(same)
    """Whether two answers to one request are the same."""
    lasting: Callable[[Answer], Answer] = staticmethod(lambda answer: answer)
    """The part of an answer that is in the digest of the results."""

    def __init__(self, terms: Terms, most: int) -> None:
        """``most`` requests are in a batch of a replay. Raises UsageError for a policy that makes no sense."""
        self.terms = terms
        self.policy = None
        if terms.policy != "off":
            names = terms.allow.split("+") if isinstance(terms.allow, str) else terms.allow
            self.policy, _ = configured(scope=terms.policy, uncovered=terms.uncovered, allow=names)
        self.plan = Plan(terms.sample, terms.replay_seed, most)
        self.subject = Subject(None, None, None, ())
        self.reports: dict[str, Report] = {}
        self.answers: dict[str, tuple[str, Answer]] = {}
        self.decisions: dict[Any, Decision] = {}
        self._closed: dict[str, Any] | None = None
        if made is not None:
            made.append(self)

    @contextmanager
    def under(self) -> Iterator[None]:
        """The policy in force for the block, on this thread with tracing; nothing where it is off."""
        if self.policy is None:
            yield
            return
        with deterministic(self.policy) as active:
            yield
        self.decisions |= active.decisions

    def keep(self, questions: Iterable[Question], answers: Iterable[Answer]) -> None:
        """The answers that the evaluation goes on with."""
        for question, answer in zip(questions, answers, strict=True):
            self.answers[question.name] = (question.same_as, answer)

    def report(self, kind: str, found: Report) -> None:
        """What a replay came to. Raises Diverged where a request differs and nobody keeps an account."""
        self.reports.setdefault(kind, Report()).add(found)
        if made is None and found.diverged:
            first = found.divergences[0]
            raise Diverged(f"{first.question}: {first.expected} at first, {first.got} {first.how}")

    @property
    def verdict(self) -> Literal["same", "diverged", "vacuous"]:
        """The worst of the kinds of requests; vacuous where none reached the model."""
        found = {self._verdict(report) for report in self.reports.values()}
        if "diverged" in found:
            return "diverged"
        return "vacuous" if "vacuous" in found or not found else "same"

    def _verdict(self, report: Report) -> Literal["same", "diverged", "vacuous"]:
        accepted = self.terms.unobserved == "accept"
        if report.verdict == "vacuous" and report.unobserved and report.compared and accepted:
            return "same"
        return report.verdict

    def to_json(self) -> dict[str, Any]:
        """What goes into the results file: the verdict, the fingerprint, digests of model, task and results."""
        if self._closed is not None:
            return self._closed
        held = self.policy
        marked = None if held is None else fingerprint.capture(held, self.subject.device, self.subject.libraries)
        accepted = [decision for decision in self.decisions.values() if isinstance(decision, Accepted)]
        allowed = [d.op for d in accepted if d.reason.startswith("allowed by the policy")]
        return {
            "verdict": self.verdict,
            "policy": "off" if held is None else held.to_json(),
            "operations": {"accepted": len(accepted), "allowed": sorted(set(allowed))},
            "replay": {kind: report.to_json() for kind, report in self.reports.items()},
            "digests": {
                "model": self.model_digest,
                "task": digest(f"{name} {same_as}" for name, (same_as, _) in self.answers.items()),
                "results": digest(
                    f"{name} {as_bytes(self.lasting(answer)).hex()}" for name, (_, answer) in self.answers.items()
                ),
            },
            "system_fingerprint": None if marked is None else marked.to_json(),
        }

    def close(self) -> None:
        """Take the account down, before the model goes."""
        self._closed = self.to_json()

    @functools.cached_property
    def model_digest(self) -> str | None:
        """Of config, tokenizer and weights, where they can be reached; None where not, or where it was not asked for."""
        module = self.subject.module
        if not self.terms.digest_weights or module is None:
            return None
        config: Any = getattr(module, "config", None)
        lines = [f"config {config.to_json_string()}"] if hasattr(config, "to_json_string") else []
        tokenizer: Any = getattr(self.subject.tokenizer, "backend_tokenizer", None)
        if tokenizer is not None:  # its padding and truncation are those of the last batch
            held = {k: v for k, v in json.loads(tokenizer.to_str()).items() if k not in ("padding", "truncation")}
            lines.append(f"tokenizer {json.dumps(held, sort_keys=True)}")
        return digest([*lines, *(f"{name} {bits.digest(tensor)}" for name, tensor in module.state_dict().items())])


def digest(lines: Iterable[str]) -> str:
    """SHA-256 over the lines, sorted: no order of requests is in it."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@contextmanager
def keeping_accounts(terms: Terms) -> Iterator[list[Account]]:
    """Inside the block every wrapper that is made leaves its account in the list, and none raises a divergence."""
    global made, defaults
    made, defaults = [], terms
    try:
        yield made
    finally:
        made = defaults = None
