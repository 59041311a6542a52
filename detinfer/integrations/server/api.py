"""The requests and answers of the servers that detinfer speaks to.

SGLang's own API (``/generate``, ``/flush_cache``) and OpenAI's completions and chat completions, with the fields that vLLM
and SGLang add to them where a server takes them. Sources: the API references of OpenAI (completions, chat), of SGLang
(sampling parameters, native API) and of vLLM (OpenAI-compatible server).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detinfer.errors import UsageError
from detinfer.integrations.server.answer import Answer, Logprobs, Tokens
from detinfer.integrations.server.transport import Fault, Rejected, Transport

Prompt = str | tuple[int, ...]
"""A text, or token ids."""
_TOKEN_ID = "token_id:"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; ``extra`` are fields added to every request's body."""

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int = 42
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: bool = True
    stream: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def named(self) -> dict[str, Any]:
        """Fields that all APIs call the same; of those that some servers lack, the ones that are not the default."""
        found: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        optional = {"top_k": (self.top_k, -1), "min_p": (self.min_p, 0.0)}
        optional["frequency_penalty"] = (self.frequency_penalty, 0.0)
        optional["presence_penalty"] = (self.presence_penalty, 0.0)
        return found | {name: value for name, (value, default) in optional.items() if value != default}


class Api(ABC):
    """One API of one server. ``lists``: several prompts fit in one request; ``ids``: prompts may be token ids."""

    name: str
    path: str
    lists = True
    ids = True
    echoes = True
    """Whether log-probabilities of the prompt itself can be asked for."""

    def __init__(self, transport: Transport, model: str | None = None) -> None:
        self.transport, self.model = transport, model

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, echo: bool = False) -> list[Answer]:
        """One request for all ``prompts``, an answer each in their order; Unanswered when it cannot be had.

        ``echo`` asks for the log-probabilities of the prompts' own tokens as well.
        """
        body = {**self.body(prompts, sampling, echo), **sampling.extra}

        def read(raw: bytes) -> list[Answer]:
            try:
                events = _events(raw) if sampling.stream else [json.loads(raw)]
                answers = self.read(events, prompts, echo)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                shown = raw[:200].decode("utf-8", "replace")
                raise Fault("malformed", f"{type(error).__name__}: {error} in {shown!r}") from error
            if len(answers) != len(prompts):
                raise Fault("items", f"{len(answers)} answers to {len(prompts)} prompts")
            named = {one.get("system_fingerprint") for one in events if isinstance(one, dict)}
            self.transport.fingerprints.update(name for name in named if isinstance(name, str) and name)
            return answers

        return self.transport.post(self.path, body, read)

    @abstractmethod
    def body(self, prompts: Sequence[Prompt], sampling: Sampling, echo: bool) -> dict[str, Any]:
        """The request."""

    @abstractmethod
    def read(self, events: list[Any], prompts: Sequence[Prompt], echo: bool) -> list[Answer]:
        """The answers in ``events``, one JSON value or those of a stream."""

    def flush(self) -> bool:
        """Empty the server's prefix cache; False where it cannot be asked to."""
        return self.transport.exists("/reset_prefix_cache") or self.transport.exists("/flush_cache")

    def probe(self, sampling: Sampling) -> None:
        """Find out whether the server takes lists and token ids."""
        ids = (11, 12, 13)
        trials: tuple[tuple[list[Prompt], str], ...] = (([ids], "ids"), (["One", "Two"], "lists"))
        for tried, name in trials:
            if not getattr(self, name):
                continue
            try:
                self.generate(tried, _short(sampling))
            except Rejected as error:
                if error.status not in (400, 422):
                    raise
                setattr(self, name, False)


class Sglang(Api):
    """SGLang's own API."""

    name = "sglang"
    path = "/generate"

    def body(self, prompts: Sequence[Prompt], sampling: Sampling, echo: bool) -> dict[str, Any]:
        """Texts or token ids, never both in one request."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts and len(texts) != len(prompts):
            raise UsageError("one request holds texts or token ids, not both")
        drawn = {**sampling.named(), "max_new_tokens": sampling.max_new_tokens, "sampling_seed": sampling.seed}
        held: dict[str, Any] = {"text": texts} if texts else {"input_ids": [list(prompt) for prompt in prompts]}
        held |= {"sampling_params": drawn, "return_logprob": sampling.logprobs, "stream": sampling.stream}
        return held | ({"logprob_start_len": 0} if echo else {})

    def read(self, events: list[Any], prompts: Sequence[Prompt], echo: bool) -> list[Answer]:
        """A stream's last event of each index is its whole answer."""
        if len(events) == 1 and isinstance(events[0], list):
            return [self._answer(item) for item in events[0]]
        whole = {int(event.get("index", 0)): event for event in events}
        return [self._answer(whole[index]) for index in sorted(whole)]

    @staticmethod
    def _answer(item: Any) -> Answer:
        meta = item.get("meta_info", {})
        after, before = (meta.get(f"{which}_token_logprobs") for which in ("output", "input"))
        tokens = item.get("output_ids")
        if tokens is None and after is not None:
            tokens = [entry[1] for entry in after]
        reason = meta.get("finish_reason")
        return Answer(
            text=item["text"],
            tokens=None if tokens is None else tuple(tokens),
            logprobs=None if after is None else tuple(entry[0] for entry in after),
            input_tokens=None if before is None else tuple(entry[1] for entry in before),
            input_logprobs=None if before is None else tuple(entry[0] for entry in before),
            finish=json.dumps(reason, sort_keys=True) if reason is not None else None,
            prompt_tokens=meta.get("prompt_tokens"),
            cached_tokens=meta.get("cached_tokens"),
        )

    def flush(self) -> bool:
        """Empty the prefix cache."""
        return self.transport.exists("/flush_cache?timeout=60") or self.transport.exists("/flush_cache")


class Completions(Api):
    """OpenAI's ``/v1/completions``."""

    name = "openai"
    path = "/v1/completions"
    token_ids = True
    """Whether the server takes vLLM's and SGLang's field that makes it name tokens by their ids."""

    def body(self, prompts: Sequence[Prompt], sampling: Sampling, echo: bool) -> dict[str, Any]:
        """One prompt as it is, several as a list."""
        plain = [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        held: dict[str, Any] = {**sampling.named(), "prompt": plain[0] if len(plain) == 1 else plain}
        held |= {"max_tokens": sampling.max_new_tokens, "seed": sampling.seed, "stream": sampling.stream}
        held |= {"model": self.model} if self.model else {}
        if sampling.logprobs:
            held |= {"logprobs": 1} | ({"return_tokens_as_token_ids": True} if self.token_ids else {})
        return held | ({"echo": True} if echo else {})

    def read(self, events: list[Any], prompts: Sequence[Prompt], echo: bool) -> list[Answer]:
        """Choices by their index; a stream's are joined."""
        parts: dict[int, list[Any]] = {}
        usage: Any = {}
        for event in events:
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                parts.setdefault(int(choice["index"]), []).append(choice)
        found = []
        for index in sorted(parts):
            mine = usage if len(prompts) == 1 else {}
            before = len(prompts[index]) if isinstance(prompts[index], tuple) else mine.get("prompt_tokens", 0)
            found.append(self._answer(parts[index], mine, before if echo else None))
        return found

    @staticmethod
    def _answer(choices: list[Any], usage: Any, echoed: int | None) -> Answer:
        tokens: list[int | str] = []
        logprobs: list[float | None] = []
        held = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
        for part in held:
            tokens += [_token(token) for token in part["tokens"]]
            logprobs += part["token_logprobs"]
        cut = echoed or 0
        finish = [choice.get("finish_reason") for choice in choices if choice.get("finish_reason")]
        return Answer(
            text="".join(choice.get("text") or "" for choice in choices),
            tokens=tuple(tokens[cut:]) if held else None,
            logprobs=tuple(logprobs[cut:]) if held else None,
            input_tokens=tuple(tokens[:cut]) if held and echoed is not None else None,
            input_logprobs=tuple(logprobs[:cut]) if held and echoed is not None else None,
            finish=finish[-1] if finish else None,
            **_counts(usage),
        )

    def probe(self, sampling: Sampling) -> None:
        """Also find out whether it names tokens by their ids when asked to."""
        if sampling.logprobs:
            try:
                self.generate(["One"], _short(sampling))
            except Rejected as error:
                if error.status not in (400, 422):
                    raise
                self.token_ids = False
        super().probe(sampling)


class Chat(Api):
    """OpenAI's ``/v1/chat/completions``: one conversation in a request, of one message."""

    name = "chat"
    path = "/v1/chat/completions"
    lists = False
    ids = False
    echoes = False

    def body(self, prompts: Sequence[Prompt], sampling: Sampling, echo: bool) -> dict[str, Any]:
        """The prompt as the user's message."""
        held: dict[str, Any] = {**sampling.named(), "messages": [{"role": "user", "content": prompts[0]}]}
        held |= {"max_tokens": sampling.max_new_tokens, "seed": sampling.seed, "stream": sampling.stream}
        held |= {"model": self.model} if self.model else {}
        return held | ({"logprobs": True} if sampling.logprobs else {})

    def read(self, events: list[Any], prompts: Sequence[Prompt], echo: bool) -> list[Answer]:
        """The first choice; a stream's parts are joined."""
        choices = [choice for event in events for choice in event["choices"] if choice["index"] == 0]
        if not choices:
            return []
        said = [choice.get("delta") or choice.get("message") or {} for choice in choices]
        held = [choice["logprobs"]["content"] for choice in choices if (choice.get("logprobs") or {}).get("content")]
        entries = [entry for part in held for entry in part]
        tokens: Tokens = tuple(entry["token"] for entry in entries)
        logprobs: Logprobs = tuple(entry["logprob"] for entry in entries)
        finish = [choice.get("finish_reason") for choice in choices if choice.get("finish_reason")]
        usage: Any = next((event["usage"] for event in reversed(events) if event.get("usage")), {})
        text = "".join(part.get("content") or "" for part in said)
        return [
            Answer(
                text,
                tokens if held else None,
                logprobs if held else None,
                finish=finish[-1] if finish else None,
                **_counts(usage),
            )
        ]


def connect(url: str, transport: Transport, api: str, model: str | None, sampling: Sampling) -> Api:
    """The API called ``api`` (sglang, openai, chat; auto looks what is there), probed for what it takes."""
    if api == "auto":
        api = "sglang" if transport.get("/get_model_info") else "openai"
    if api in ("openai", "chat") and model is None:
        listed = transport.get("/v1/models")
        names = [entry.get("id") for entry in listed.get("data", [])] if isinstance(listed, dict) else []
        if len(names) > 1:
            raise UsageError(f"{url} has {len(names)} models: pick one by --model, such as {names[0]}")
        model = names[0] if names else None
    kinds: dict[str, type[Api]] = {"sglang": Sglang, "openai": Completions, "chat": Chat}
    found = kinds[api](transport, model)
    found.probe(sampling)
    return found


def _short(sampling: Sampling) -> Sampling:
    return Sampling(max_new_tokens=1, seed=sampling.seed, logprobs=sampling.logprobs, extra=sampling.extra)


def _counts(usage: Any) -> dict[str, Any]:
    details = usage.get("prompt_tokens_details") or {}
    return {"prompt_tokens": usage.get("prompt_tokens"), "cached_tokens": details.get("cached_tokens")}


def _token(token: Any) -> int | str:
    if isinstance(token, str) and token.startswith(_TOKEN_ID):
        return int(token.removeprefix(_TOKEN_ID))
    return token if isinstance(token, int) else str(token)


def _events(raw: bytes) -> list[Any]:
    """The JSON values of a stream of server-sent events; Fault where it breaks off or reports an error."""
    lines = [line[5:].strip() for line in raw.decode("utf-8").splitlines() if line.startswith("data:")]
    if not lines:
        raise Fault("malformed", "a stream without an event")
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    for event in events:
        if isinstance(event, dict) and event.get("error"):
            raise Fault("stream error", str(event["error"])[:200])
    return events
