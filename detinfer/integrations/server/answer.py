"""One answer of a server, and whether two of them hold the same bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

Tokens = tuple["int | str", ...]
Logprobs = tuple["float | None", ...]


@dataclass(frozen=True)
class Answer:
    """What a server generated for one prompt; a part that it did not send is None.

    ``tokens`` are ids, or texts where the server gives no ids; ``logprobs`` belong to them. ``input_tokens`` and
    ``input_logprobs`` are the prompt's, where they were asked for. ``prompt_tokens`` and ``cached_tokens`` are counts.
    """

    text: str
    tokens: Tokens | None = None
    logprobs: Logprobs | None = None
    input_tokens: Tokens | None = None
    input_logprobs: Logprobs | None = None
    finish: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None

    def key(self) -> tuple[object, ...]:
        """Equal for answers that agree in text, tokens, and every bit of every log-probability."""
        logprobs = None if self.logprobs is None else tuple(map(bits, self.logprobs))
        return self.text, self.tokens, logprobs, self.finish


@dataclass(frozen=True)
class Difference:
    """The first difference of two answers: in which field, at which position of it (None: as a whole), both values."""

    field: str
    position: int | None
    got: str
    expected: str

    def __str__(self) -> str:
        """As SGLang's test says it."""
        if self.field == "logprobs" and self.position is not None:
            return f"Logprob mismatch at position {self.position}: {self.got} vs {self.expected}"
        name = {"text": "Text", "tokens": "Output token IDs", "logprobs": "Logprobs", "finish": "Finish reason"}
        place = "" if self.position is None else f" at position {self.position}"
        return f"{name[self.field]} mismatch{place}: {self.got} vs {self.expected}"


def bits(value: float | None) -> bytes | None:
    """The bytes of a log-probability: -0.0 is not 0.0, and a NaN equals itself alone."""
    return None if value is None else struct.pack("<d", value)


def difference(got: Answer, expected: Answer, *, logprobs: bool = True) -> Difference | None:
    """The first difference, tokens before text before log-probabilities; None where there is none.

    Log-probabilities are compared bit by bit, unless ``logprobs`` is False. One that is not finite is a difference.
    """
    if got.tokens != expected.tokens:
        return _first("tokens", got.tokens, expected.tokens)
    if got.text != expected.text:
        return Difference("text", None, repr(got.text), repr(expected.text))
    if got.finish != expected.finish:
        return Difference("finish", None, repr(got.finish), repr(expected.finish))
    return first_logprob(got.logprobs, expected.logprobs) if logprobs else None


def first_logprob(got: Logprobs | None, expected: Logprobs | None) -> Difference | None:
    """The first log-probability that differs in a bit, or is not finite."""
    if got is None or expected is None:
        return None if got is expected else _first("logprobs", got, expected)
    for position, (one, other) in enumerate(zip(got, expected, strict=False)):
        if bits(one) != bits(other):
            apart = f" (diff: {one - other!r})" if one is not None and other is not None else ""
            return Difference("logprobs", position, repr(one), repr(other) + apart)
        if one is not None and not math.isfinite(one):
            return Difference("logprobs", position, repr(one), "a finite number")
    if len(got) != len(expected):
        return Difference("logprobs", None, f"{len(got)} of them", f"{len(expected)} of them")
    return None


def _first(field: str, got: Sequence[object] | None, expected: Sequence[object] | None) -> Difference:
    if got is None or expected is None:
        return Difference(field, None, *("none" if one is None else f"{len(one)} of them" for one in (got, expected)))
    for position, (one, other) in enumerate(zip(got, expected, strict=False)):
        if one != other:
            return Difference(field, position, repr(one), repr(other))
    return Difference(field, None, f"{len(got)} of them", f"{len(expected)} of them")
