"""A model provider for Inspect that wraps another: the policy in force, a replay, a fingerprint in the logs.

``register`` makes it known to Inspect as ``detinfer``: ``detinfer/hf/NAME`` is ``hf/NAME``, wrapped. Inspect puts requests into
batches as they come, so the replay waits for the end of the run, when nothing else is asked: that is a hook's.
Inspect 0.3: https://github.com/UKGovernmentBEIS/inspect_ai, ``model/_model.py``, ``hooks/_hooks.py``.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import torch

from detinfer.errors import DetinferError, Diverged, TargetError, UsageError
from detinfer.integrations import enforced
from detinfer.integrations.composition import Batches
from detinfer.integrations.enforced import Account, Subject, Terms
from detinfer.integrations.replay import Answer, Question, as_bytes, replay
from detinfer.policy import deterministic

INSTALL = "pip install inspect-ai"
LIBRARIES = ("inspect_ai", "tokenizers", "transformers")
"""Packages whose code makes the answers of a model of Inspect."""
MOST = 8
"""Requests in a batch of a replay."""

UNFELT = {
    "adaptive_connections",
    "attempt_timeout",
    "batch",
    "cache",
    "max_connections",
    "max_retries",
    "stream_idle_timeout",
    "timeout",
}
"""Fields of a request's configuration that say how it is sent, not what is asked."""

models: list[Enforced] = []
"""Every wrapped model of this process: Inspect keeps them from one run to the next."""
failures: list[DetinferError] = []
"""What the policy refused: Inspect makes a sample's error of it."""
logs: list[Any] = []
"""Logs of the runs that ended."""


class Enforced:
    """What stands between Inspect and a provider of models. ``register`` joins it with Inspect's own base class.

    Arguments (``-M``) are those of the provider inside and ``enforced.Terms``. Where the model is in this process, its
    log-probabilities are asked for and compared too; an answer has them only if they were wanted.
    """

    def __init__(
        self, model_name: str, base_url: Any = None, api_key: Any = None, config: Any = None, **arguments: Any
    ):
        super().__init__(model_name, base_url, api_key, [], config)  # type: ignore[call-arg]
        own = {one.name: arguments.pop(one.name) for one in fields(Terms) if one.name in arguments}
        self.terms = Terms(**own) if own or enforced.defaults is None else enforced.defaults
        get_model: Any = importlib.import_module("inspect_ai.model").get_model
        self.inner = get_model(
            model_name, config=config, base_url=base_url, api_key=api_key, memoize=False, **arguments
        ).api
        module = getattr(self.inner, "model", None)
        self.subject = Subject(
            module if isinstance(module, torch.nn.Module) else None,
            getattr(self.inner, "tokenizer", None),
            getattr(self.inner, "device", None),
            LIBRARIES,
        )
        self.account: Account | None = None
        self._flying, self._open = 0, ExitStack()
        if self.subject.module is not None:
            module.generate = self._traced(module.generate)  # type: ignore[union-attr]
        models.append(self)

    def _traced(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """``generate``, which runs on a thread of Inspect's, with every operation of that thread looked at."""

        @functools.wraps(generate)
        def under(*args: Any, **kwargs: Any) -> Any:
            if self.account is None:
                return generate(*args, **kwargs)
            with self.account.under():
                return generate(*args, **kwargs)

        return under

    def _begin(self) -> Account:
        """The account of this run."""
        if self.account is None:
            self.account = Account(self.terms, MOST)
            self.account.subject = self.subject
            self.account.equal, self.account.lasting = equal, said
            self.asked: list[tuple[Question, Answer]] = []
            self.batches = Batches(self.subject.module) if self.subject.module is not None else None
            if self.batches is not None:
                self.batches.__enter__()
        return self.account

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:
        """An answer of the inner provider, kept for the replay."""
        account = self._begin()
        request = copy.deepcopy((input, tools, tool_choice, config))
        try:
            found = await self._ask(request, {})
        except DetinferError as error:
            failures.append(error)
            raise error.with_traceback(
                None
            ) from None  # Inspect prints every frame with its values, which takes seconds
        output = found[0] if isinstance(found, tuple) else found
        if not isinstance(output, Exception):
            question, answer = self._question(request), answered(output)
            account.keep([question], [answer])
            self.asked.append((question, answer))
            if not config.logprobs and self.subject.module is not None:
                for choice in output.choices:
                    choice.logprobs = None
        return found

    async def _ask(self, request: Any, changes: dict[str, Any]) -> Any:
        """Ask the inner provider. The policy covers every thread from the first request in flight to the last."""
        messages, tools, choice, config = copy.deepcopy(request)
        if self.subject.module is not None and not config.logprobs:
            changes = {"logprobs": True, **changes}
        held = None if self.account is None else self.account.policy
        if self._flying == 0 and held is not None:
            self._open.enter_context(deterministic(held))
        self._flying += 1
        try:
            return await self.inner.generate(messages, tools, choice, config.model_copy(update=changes))
        finally:
            self._flying -= 1
            if self._flying == 0:
                self._open.close()

    def _question(self, request: Any) -> Question:
        messages, tools, choice, config = request
        messages = [message.model_dump(mode="json", exclude={"id", "metadata"}) for message in messages]
        asked = [
            messages,
            [tool.name for tool in tools],
            repr(choice),
            config.model_dump(mode="json", exclude_none=True, exclude=UNFELT),
        ]
        sample: Any = importlib.import_module("inspect_ai.log._samples").sample_active()
        where = "outside of samples" if sample is None else _place(sample)
        assert self.account is not None
        number = sum(name.startswith(f"{where}, request ") for name in self.account.answers) + 1
        draws = getattr(self.inner, "do_sample", (config.temperature or 0) > 0)
        same_as = hashlib.sha256(json.dumps(asked, sort_keys=True, default=repr).encode()).hexdigest()
        return Question(f"{where}, request {number}", request, same_as, not draws)

    async def finish(self) -> Account | None:
        """Ask a sample of the run's requests again; the run's account. None where nothing was asked."""
        account, self_asked = self.account, getattr(self, "asked", [])
        if account is None:
            return None
        anyio: Any = importlib.import_module("anyio")
        if self.batches is not None:
            self.batches.__exit__(None, None, None)

        def ask(requests: list[Any], batch: int) -> list[Answer]:
            return list(anyio.from_thread.run(self._ask_all, requests, batch))

        def work() -> Any:
            questions, answers = [one for one, _ in self_asked], [answer for _, answer in self_asked]
            module = self.subject.module
            return replay(questions, answers, self.batches, ask, account.plan, module, prompt_only=True, equal=equal)

        try:
            account.report("generate", await anyio.to_thread.run_sync(work))
        finally:
            account.close()
            self.account = None
        return account

    async def _ask_all(self, requests: list[Any], batch: int) -> list[Answer]:
        """Answers to ``requests``, asked at once: Inspect's own queue makes a batch as soon as it has this many."""
        anyio: Any = importlib.import_module("anyio")
        found: dict[int, Answer] = {}

        async def one(number: int) -> None:
            output = await self._ask(requests[number], {"max_connections": batch})
            output = output[0] if isinstance(output, tuple) else output
            found[number] = repr(output) if isinstance(output, Exception) else answered(output)

        async with anyio.create_task_group() as group:
            for number in range(len(requests)):
                group.start_soon(one, number)
        return [found[number] for number in range(len(requests))]


def _place(sample: Any) -> str:
    return f"task {sample.task}, sample {sample.sample.id}, epoch {sample.epoch}"


def answered(output: Any) -> Answer:
    """What a model said, of a ``ModelOutput``: of each choice the text, calls of tools, and log-probabilities."""
    found = []
    for choice in output.choices:
        calls = tuple(
            (call.function, json.dumps(call.arguments, sort_keys=True)) for call in choice.message.tool_calls or ()
        )
        tokens = choice.logprobs.content if choice.logprobs else ()
        found.append((choice.message.text, calls, tuple((one.token, float(one.logprob)) for one in tokens)))
    return tuple(found)


def equal(a: Answer, b: Answer) -> bool:
    """Whether texts and calls have the same bytes, and log-probabilities as far as both go.

    A row that ended before others of its batch has further ones of padding, which are nobody's answer.
    """
    if len(a) != len(b):
        return False
    for (text, calls, tokens), (other_text, other_calls, other_tokens) in zip(a, b, strict=True):
        most = min(len(tokens), len(other_tokens))
        if as_bytes((text, calls, tokens[:most])) != as_bytes((other_text, other_calls, other_tokens[:most])):
            return False
    return True


def said(answer: Answer) -> Answer:
    """Texts and calls: how many log-probabilities an answer has, its batch decides (``equal``)."""
    return tuple(choice[:2] for choice in answer)


async def end_of_run(found: list[Any], unwatched: bool) -> None:
    """Replay what was asked in this run, and write each model's account into the logs of its tasks (``eval.metadata``).

    ``unwatched``: nobody keeps an account, so that a divergence makes errors of the logs and ends the process with 1. Inspect
    itself swallows what a hook raises, and ends with 0 whatever its logs say.
    """
    logs.extend(found)
    write: Any = importlib.import_module("inspect_ai.log").write_eval_log_async
    error: Any = importlib.import_module("inspect_ai.log").EvalError
    worst: DetinferError | None = None
    for model in models:
        account, problem = model.account, None
        if account is None:
            continue
        try:
            await model.finish()
        except Exception as raised:
            worst = problem = _told(raised)
            if not isinstance(problem, Diverged):
                failures.append(problem)
        for log in found:
            if log.eval.model != model.qualified_model_name:  # type: ignore[attr-defined]
                continue
            log.eval.metadata = {**(log.eval.metadata or {}), "detinfer": account.to_json()}
            if problem is not None:
                log.status, log.error = "error", error(message=str(problem), traceback="", traceback_ansi="")
            await write(log, log.location, header_only=True)
    if worst is not None and unwatched:
        print(f"detinfer: {worst}", file=sys.stderr)
        raise SystemExit(worst.exit_code)


def _told(raised: BaseException) -> DetinferError:
    """What went wrong in a replay, out of the groups that tasks put it into."""
    while (inside := getattr(raised, "exceptions", None)) is not None:
        raised = inside[0]
    if isinstance(raised, DetinferError):
        return raised
    return TargetError(f"requests could not be asked again: {type(raised).__name__}: {raised}")


@functools.cache
def register() -> type[Any]:
    """Make the provider ``detinfer`` and its hook known to Inspect in this process. UsageError where Inspect is not there."""
    try:
        base: Any = importlib.import_module("inspect_ai.model").ModelAPI
        hooks: Any = importlib.import_module("inspect_ai.hooks")
    except ImportError as error:
        raise UsageError(f"Inspect cannot be imported ({error}): {INSTALL}") from error

    def handed_on(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(base, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.inner, name)(*args, **kwargs)

        return method

    public = [name for name in dir(base) if not name.startswith("_") and callable(getattr(base, name))]
    methods = {name: handed_on(name) for name in public if not hasattr(Enforced, name)}
    provider = type("Detinfer", (Enforced, base), {**methods, "__doc__": Enforced.__doc__, "__module__": __name__})

    async def on_run_end(self: Any, data: Any) -> None:
        await end_of_run(list(data.logs), unwatched=enforced.made is None)

    hook = type("Detinfer", (hooks.Hooks,), {"on_run_end": on_run_end, "__module__": __name__})
    importlib.import_module("inspect_ai.model").modelapi(name="detinfer")(provider)
    hooks.hooks(name="replay", description="asks a model's requests again and compares the bits")(hook)
    return provider
