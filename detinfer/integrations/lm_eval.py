"""A model for lm-evaluation-harness that wraps another: the policy in force, a replay, a fingerprint in the results.

``register`` makes it known to the harness as ``detinfer``; the model inside is any that the harness knows (``inner=hf``).
lm-evaluation-harness 0.4: https://github.com/EleutherAI/lm-evaluation-harness, ``lm_eval/api/model.py``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch

from detinfer.errors import UsageError
from detinfer.integrations.composition import Batches
from detinfer.integrations.enforced import Account, Subject, Terms
from detinfer.integrations.replay import Answer, Question, replay

INSTALL = "pip install lm-eval"
LIBRARIES = ("lm_eval", "tokenizers", "transformers")
"""Packages whose code makes the answers of a model of the harness."""


class Enforced:
    """What stands between the harness and a model of it. ``register`` joins it with the harness's own base class.

    ``inner`` is the name of the model inside, which is given every argument that is not listed here. ``policy`` to
    ``digest_weights`` are ``enforced.Terms``.

    Raises UsageError for values that make no sense, Diverged where a replay differs and nobody keeps an account, and
    what the policy raises.
    """

    def __init__(
        self,
        inner: str = "hf",
        policy: str | None = None,
        uncovered: str | None = None,
        allow: str | Sequence[str] | None = None,
        sample: int = 16,
        replay_seed: int = 0,
        unobserved: Literal["vacuous", "accept"] = "vacuous",
        digest_weights: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        terms = Terms(policy, uncovered, allow, sample, replay_seed, unobserved, digest_weights)
        self.account = Account(terms, max(4, batch_size) if isinstance(batch_size, int) else 8)
        registry = importlib.import_module("lm_eval.api.registry")
        options = {"batch_size": batch_size, "max_batch_size": max_batch_size, "device": device}
        self.inner: Any = registry.get_model(inner).create_from_arg_obj(arguments, options)
        if self.inner.world_size > 1:
            raise UsageError("the harness's own data parallelism is not replayed: run one process")
        self.arguments = {"inner": inner, **arguments}
        module = getattr(self.inner, "model", None)
        self.account.subject = Subject(
            module if isinstance(module, torch.nn.Module) else None,
            getattr(self.inner, "tokenizer", None),
            getattr(self.inner, "device", None),
            LIBRARIES,
        )

    def loglikelihood(self, requests: list[Any]) -> list[Answer]:
        """(log-probability, whether greedy) of each continuation."""
        return self._run("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Answer]:
        """The log-probability of each text."""
        return self._run("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any]) -> list[Answer]:
        """A continuation of each context. Where the task draws tokens at random, nothing is compared."""
        return self._run("generate_until", requests)

    def _run(self, kind: str, requests: list[Any]) -> list[Answer]:
        questions = [self._question(kind, request, number) for number, request in enumerate(requests)]
        module = self.account.subject.module
        with Batches(module) if module is not None else nullcontext() as before:
            answers = self._ask(kind, requests)
        self.account.keep(questions, answers)
        size, hook = getattr(self.inner, "batch_size_per_gpu", None), self.inner.cache_hook
        self.inner.cache_hook = type(hook)(None)

        def again(group: list[Any], batch: int) -> list[Answer]:
            if size is not None:
                self.inner.batch_size_per_gpu = batch
            return self._ask(kind, group, quiet=True)

        try:
            report = replay(questions, answers, before, again, self.account.plan, module, kind == "generate_until")
        finally:
            self.inner.cache_hook = hook
            if size is not None:
                self.inner.batch_size_per_gpu = size
        self.account.report(kind, report)
        return answers

    def _ask(self, kind: str, requests: list[Any], quiet: bool = False) -> list[Answer]:
        ask = getattr(self.inner, kind)
        options = {"disable_tqdm": True} if quiet and "disable_tqdm" in inspect.signature(ask).parameters else {}
        with self.account.under():
            return list(ask(requests, **options))

    def _question(self, kind: str, request: Any, number: int) -> Question:
        arguments = json.dumps([kind, *request.args], sort_keys=True, default=repr)
        drawn = kind == "generate_until" and bool(request.args[1].get("do_sample", False))
        name = f"task {request.task_name}, document {request.doc_id}, {kind} {request.idx}"
        if name in self.account.answers or (request.repeats or 1) > 1:
            name += f", number {number}"
        return Question(name, request, hashlib.sha256(arguments.encode()).hexdigest(), not drawn)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into ``config`` of its results file: the inner model's, and ``detinfer``."""
        found = self.inner.get_model_info() if hasattr(self.inner, "get_model_info") else {}
        return {**found, "detinfer": self.account.to_json()}

    def set_cache_hook(self, hook: Any) -> None:
        """Answers that an earlier run left in a cache would be neither under the policy nor replayed: UsageError."""
        if hook.dbdict is not None and len(hook.dbdict):
            raise UsageError(
                f"--use_cache: it holds {len(hook.dbdict)} answers of an earlier run, whose keys have neither model, batch "
                "size nor policy. They would not be replayed: give another file, or delete this one"
            )
        self.inner.set_cache_hook(hook)

    @property
    def rank(self) -> int:
        """The inner model's."""
        return int(self.inner.rank)

    @property
    def world_size(self) -> int:
        """The inner model's."""
        return int(self.inner.world_size)

    @property
    def device(self) -> Any:
        """The inner model's."""
        return self.inner.device

    @property
    def tokenizer_name(self) -> str:
        """The inner model's."""
        return str(self.inner.tokenizer_name)

    def chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """The inner model's."""
        return self.inner.chat_template(*args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """The inner model's."""
        return self.inner.apply_chat_template(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not made yet
            raise AttributeError(name)
        return getattr(self.inner, name)


def register() -> type[Any]:
    """Make the model ``detinfer`` known to the harness in this process. UsageError where the harness is not installed."""
    try:
        base: Any = importlib.import_module("lm_eval.api.model").LM
        importlib.import_module("lm_eval.models")  # first: the harness looks for its own only while it knows none
    except ImportError as error:
        raise UsageError(f"lm-evaluation-harness cannot be imported ({error}): {INSTALL}") from error
    registry: Any = importlib.import_module("lm_eval.api.registry").model_registry
    if "detinfer" in registry.keys():  # noqa: SIM118  (not a mapping)
        found: type[Any] = registry.get("detinfer")
        return found
    model = type("Detinfer", (Enforced, base), {"__doc__": Enforced.__doc__})
    registry.register("detinfer", target=model)
    return model
