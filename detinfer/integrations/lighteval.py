"""A model for lighteval that wraps another: the policy in force, a replay, a fingerprint in the results.

lighteval 0.13: https://github.com/huggingface/lighteval, ``models/abstract_model.py``. ``wrap`` makes one of any of its models
that is not asynchronous; ``lighteval_model`` is the file for ``lighteval custom``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from detinfer.errors import UsageError
from detinfer.integrations.composition import Batches
from detinfer.integrations.enforced import Account, Subject, Terms
from detinfer.integrations.replay import Answer, Question, Report, replay

INSTALL = "pip install lighteval"
LIBRARIES = ("lighteval", "tokenizers", "transformers")
"""Packages whose code makes the answers of a model of lighteval."""
SEEDS = "aten::random_"
"""Allowed besides what the policy allows: torch's DataLoader, which lighteval asks for its batches, draws the seed of worker
processes that it does not have. Tokens are drawn with other operations."""
MOST = 8
"""Documents in a batch of a replay; each has as many rows as choices."""


class NoCache:
    """What lighteval expects where a model's cache is."""

    def _init_registry(self, registry: Any) -> None:
        """There is nothing to keep by task."""


class Enforced:
    """What stands between lighteval and a model of it. ``wrap`` joins it with lighteval's own base class.

    lighteval's cache of answers is off: it would give those of earlier runs, from the user's folder, and ask the model nothing;
    it also rounds log-probabilities to ten digits. Raises UsageError for a model that answers asynchronously, Diverged where a replay differs and
    nobody keeps an account, and what the policy raises.
    """

    def __init__(self, inner: Any, terms: Terms) -> None:
        if getattr(inner, "is_async", False):
            raise UsageError(f"{type(inner).__name__}: a model that answers asynchronously is not replayed")
        self.inner = inner
        self.account = Account(terms, MOST)
        if self.account.policy is not None and SEEDS not in self.account.policy.allow:
            allowed = (*self.account.policy.allow, SEEDS)
            self.account.policy = replace(self.account.policy, allow=allowed)
        module = getattr(inner, "model", None)
        self.account.subject = Subject(
            module if isinstance(module, torch.nn.Module) else None,
            getattr(inner, "_tokenizer", None),
            getattr(inner, "device", None),
            LIBRARIES,
        )
        inner._cache = None
        self._cache = NoCache()
        self.config = _described(inner.config, self.account)

    def greedy_until(self, docs: Sequence[Any]) -> list[Any]:
        """A continuation of each document. Where tokens are drawn at random, nothing is compared."""
        return self._run("greedy_until", list(docs))

    def loglikelihood(self, docs: Sequence[Any]) -> list[Any]:
        """The log-probability of each choice of each document."""
        return self._run("loglikelihood", list(docs))

    def loglikelihood_rolling(self, docs: Sequence[Any]) -> list[Any]:
        """The log-probability of each document."""
        return self._run("loglikelihood_rolling", list(docs))

    def _run(self, kind: str, docs: list[Any]) -> list[Any]:
        questions = [self._question(kind, doc) for doc in docs]
        module = self.account.subject.module
        with Batches(module) if module is not None else nullcontext() as before:
            responses = self._ask(kind, docs)
        answers = [answered(response) for response in responses]
        self.account.keep(questions, answers)
        size = getattr(self.inner.config, "batch_size", None)

        def again(group: list[Any], batch: int) -> list[Answer]:
            if hasattr(self.inner.config, "batch_size"):
                # Log-probabilities: divided by the most choices there are, and rounded to a multiple of eight documents.
                rows = max(len(doc.choices) for doc in group) * 8 * -(-batch // 8)
                self.inner.config.batch_size = batch if kind == "greedy_until" else rows
            return [answered(response) for response in self._ask(kind, group)]

        try:
            report = self._replay(questions, answers, before, again, kind)
        finally:
            if hasattr(self.inner.config, "batch_size"):
                self.inner.config.batch_size = size
        self.account.report(kind, report)
        for response in responses:  # tensors, which lighteval's own cache would have turned into lists
            response.input_tokens, response.output_tokens = (
                _plain(response.input_tokens),
                _plain(response.output_tokens),
            )
        return responses

    def _replay(
        self, questions: list[Question], answers: list[Answer], before: Batches | None, again: Any, kind: str
    ) -> Report:
        module = self.account.subject.module
        return replay(questions, answers, before, again, self.account.plan, module, kind == "greedy_until")

    def _ask(self, kind: str, docs: list[Any]) -> list[Any]:
        with self.account.under():
            return list(getattr(self.inner, kind)(docs))

    def _question(self, kind: str, doc: Any) -> Question:
        asked = [kind, doc.query, doc.choices, doc.generation_size, doc.stop_sequences, doc.instruction]
        arguments = json.dumps([*asked, [shot.query for shot in doc.fewshot_samples]], sort_keys=True, default=repr)
        name = f"task {doc.task_name}, document {doc.id}, {kind}"
        if name in self.account.answers:
            name += f", number {len(self.account.answers)}"
        drawn = kind == "greedy_until" and (doc.num_samples > 1 or bool(self._temperature))
        return Question(name, doc, hashlib.sha256(arguments.encode()).hexdigest(), not drawn)

    @property
    def _temperature(self) -> float:
        return float(getattr(self.inner.config.generation_parameters, "temperature", 0) or 0)

    def cleanup(self) -> None:
        """Take the account down, which reads the weights, and let the inner model go."""
        self.account.close()
        self.inner.cleanup()

    @property
    def tokenizer(self) -> Any:
        """The inner model's."""
        return self.inner.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        """The inner model's."""
        return bool(self.inner.add_special_tokens)

    @property
    def max_length(self) -> int:
        """The inner model's."""
        return int(self.inner.max_length)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not made yet
            raise AttributeError(name)
        return getattr(self.inner, name)


def answered(response: Any) -> Answer:
    """What a model said, of a ``ModelResponse``: texts, log-probabilities, whether greedy; no counts of padding."""
    logprobs = tuple(float(value) for value in response.logprobs)
    return (*logprobs, *(bool(value) for value in response.argmax_logits_eq_gold), *map(str, response.text))


def _plain(tokens: Any) -> Any:
    if isinstance(tokens, torch.Tensor):
        return tokens.tolist()
    return [_plain(one) for one in tokens] if isinstance(tokens, list | tuple) else tokens


def _described(config: Any, account: Account) -> Any:
    """``config``, which lighteval writes into its results file (``config_general.model_config``), with the account."""

    def model_dump(self: Any, **options: Any) -> dict[str, Any]:
        return {**kind.model_dump(self, **options), "detinfer": account.to_json()}

    kind = type(config)
    described: Any = type(kind.__name__, (kind,), {"model_dump": model_dump, "__module__": kind.__module__})
    return described.model_construct(**vars(config))  # as it is: its own defaults may not pass its validation


def wrap(inner: Any, terms: Terms) -> Any:
    """A model of lighteval around ``inner``. UsageError where lighteval is not installed."""
    try:
        base: Any = importlib.import_module("lighteval.models.abstract_model").LightevalModel
    except ImportError as error:
        raise UsageError(f"lighteval cannot be imported ({error}): {INSTALL}") from error
    return type("Detinfer", (Enforced, base), {"__doc__": Enforced.__doc__})(inner, terms)
