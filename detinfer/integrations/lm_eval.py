"""A model for lm-evaluation-harness that wraps another: the policy in force, a replay, a fingerprint in the results.

``register`` makes it known to the harness as ``detinfer``; the model inside is any that the harness knows (``inner=hf``).
lm-evaluation-harness 0.4: https://github.com/EleutherAI/lm-evaluation-harness, ``lm_eval/api/model.py``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch

from detinfer import bits, fingerprint
from detinfer.errors import Diverged, UsageError
from detinfer.integrations.composition import Batches
from detinfer.integrations.replay import Answer, Plan, Question, Report, as_bytes, replay
from detinfer.policy import Accepted, Decision, deterministic
from detinfer.policy.configured import configured

INSTALL = "pip install lm-eval"
LIBRARIES = ("lm_eval", "tokenizers", "transformers")
"""Packages whose code makes the answers of a model of the harness."""

made: list[Enforced] | None = None
"""Where somebody keeps an account (``detinfer eval``), each wrapper that was made; a divergence is then theirs to tell."""


class Enforced:
    """What stands between the harness and a model of it. ``register`` joins it with the harness's own base class.

    ``inner`` is the name of the model inside, which is given every argument that is not listed here. ``policy`` is a
    scope, ``off``, or None for the project's; ``uncovered`` and ``allow`` (a list, or names joined by ``+``) as in
    ``Policy``. ``sample`` requests of each kind are replayed, chosen by ``replay_seed``. ``unobserved="accept"`` lets a
    model pass whose batches cannot be seen (it runs in another process). ``digest_weights=False`` leaves out the
    weights' digest, which reads all of them.

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
        if unobserved not in ("vacuous", "accept"):
            raise UsageError(f"unobserved={unobserved}: vacuous or accept")
        if sample < 1:
            raise UsageError(f"sample={sample}: at least one request is replayed")
        names = allow.split("+") if isinstance(allow, str) else allow
        self.enforced = None
        if policy != "off":
            self.enforced, _ = configured(scope=policy, uncovered=uncovered, allow=names)
        registry = importlib.import_module("lm_eval.api.registry")
        options = {"batch_size": batch_size, "max_batch_size": max_batch_size, "device": device}
        self.inner: Any = registry.get_model(inner).create_from_arg_obj(arguments, options)
        if self.inner.world_size > 1:
            raise UsageError("the harness's own data parallelism is not replayed: run one process")
        self.arguments = {"inner": inner, **arguments}
        self.plan = Plan(sample, replay_seed, max(4, batch_size) if isinstance(batch_size, int) else 8)
        self.reports: dict[str, Report] = {}
        self.answers: dict[str, tuple[str, Answer]] = {}
        self.decisions: dict[Any, Decision] = {}
        self._unobserved, self._digest_weights = unobserved, digest_weights
        if made is not None:
            made.append(self)

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
        module = getattr(self.inner, "model", None)
        module = module if isinstance(module, torch.nn.Module) else None
        with Batches(module) if module is not None else nullcontext() as before:
            answers = self._ask(kind, requests)
        for question, answer in zip(questions, answers, strict=True):
            self.answers[question.name] = (question.same_as, answer)
        size, hook = getattr(self.inner, "batch_size_per_gpu", None), self.inner.cache_hook
        self.inner.cache_hook = type(hook)(None)

        def again(group: list[Any], batch: int) -> list[Answer]:
            if size is not None:
                self.inner.batch_size_per_gpu = batch
            return self._ask(kind, group, quiet=True)

        try:
            report = replay(questions, answers, before, again, self.plan, module, kind == "generate_until")
        finally:
            self.inner.cache_hook = hook
            if size is not None:
                self.inner.batch_size_per_gpu = size
        self.reports.setdefault(kind, Report()).add(report)
        if made is None and report.diverged:
            first = report.divergences[0]
            raise Diverged(f"{first.question}: {first.expected} at first, {first.got} {first.how}")
        return answers

    def _ask(self, kind: str, requests: list[Any], quiet: bool = False) -> list[Answer]:
        ask = getattr(self.inner, kind)
        options = {"disable_tqdm": True} if quiet and "disable_tqdm" in inspect.signature(ask).parameters else {}
        if self.enforced is None:
            return list(ask(requests, **options))
        with deterministic(self.enforced) as active:
            answers = list(ask(requests, **options))
        self.decisions |= active.decisions
        return answers

    def _question(self, kind: str, request: Any, number: int) -> Question:
        arguments = json.dumps([kind, *request.args], sort_keys=True, default=repr)
        drawn = kind == "generate_until" and bool(request.args[1].get("do_sample", False))
        name = f"task {request.task_name}, document {request.doc_id}, {kind} {request.idx}"
        if name in self.answers or (request.repeats or 1) > 1:
            name += f", number {number}"
        return Question(name, request, hashlib.sha256(arguments.encode()).hexdigest(), not drawn)

    @property
    def verdict(self) -> Literal["same", "diverged", "vacuous"]:
        """The worst of the kinds of requests; vacuous where none reached the model."""
        found = {self._verdict(report) for report in self.reports.values()}
        if "diverged" in found:
            return "diverged"
        return "vacuous" if "vacuous" in found or not found else "same"

    def _verdict(self, report: Report) -> Literal["same", "diverged", "vacuous"]:
        if report.verdict == "vacuous" and report.unobserved and report.compared and self._unobserved == "accept":
            return "same"
        return report.verdict

    def account(self) -> dict[str, Any]:
        """What goes into the results file: the verdict, the fingerprint, digests of model, task and results."""
        held = self.enforced
        marked = None if held is None else fingerprint.capture(held, getattr(self.inner, "device", None), LIBRARIES)
        accepted = [d for d in self.decisions.values() if isinstance(d, Accepted)]
        allowed = [d.op for d in accepted if d.reason.startswith("allowed by the policy")]
        return {
            "verdict": self.verdict,
            "policy": "off" if held is None else held.to_json(),
            "operations": {"accepted": len(accepted), "allowed": sorted(set(allowed))},
            "replay": {kind: report.to_json() for kind, report in self.reports.items()},
            "digests": {
                "model": self.model_digest,
                "task": _digest(f"{name} {same_as}" for name, (same_as, _) in self.answers.items()),
                "results": _digest(f"{name} {as_bytes(answer).hex()}" for name, (_, answer) in self.answers.items()),
            },
            "system_fingerprint": None if marked is None else marked.to_json(),
        }

    @functools.cached_property
    def model_digest(self) -> str | None:
        """Of config, tokenizer and weights, where they can be reached; None where not, or where it was not asked for."""
        module = getattr(self.inner, "model", None)
        if not self._digest_weights or not isinstance(module, torch.nn.Module):
            return None
        config: Any = getattr(module, "config", None)
        lines = [f"config {config.to_json_string()}"] if hasattr(config, "to_json_string") else []
        tokenizer: Any = getattr(getattr(self.inner, "tokenizer", None), "backend_tokenizer", None)
        if tokenizer is not None:  # its padding and truncation are those of the last batch
            held = {k: v for k, v in json.loads(tokenizer.to_str()).items() if k not in ("padding", "truncation")}
            lines.append(f"tokenizer {json.dumps(held, sort_keys=True)}")
        return _digest([*lines, *(f"{name} {bits.digest(tensor)}" for name, tensor in module.state_dict().items())])

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into ``config`` of its results file: the inner model's, and ``detinfer``."""
        found = self.inner.get_model_info() if hasattr(self.inner, "get_model_info") else {}
        return {**found, "detinfer": self.account()}

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


def _digest(lines: Any) -> str:
    """SHA-256 over the lines, sorted: no order of requests is in it."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


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
