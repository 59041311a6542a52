"""Prompts for a server, drawn from a seed: distinct texts of one kind, of mixed lengths, and of a given number of tokens."""

from __future__ import annotations

import random

from detinfer.errors import UsageError
from detinfer.integrations.server.api import Api, Prompt, Sampling

_OPENINGS = (
    "Tell me about",
    "Explain",
    "Write a story about",
    "What is known of",
    "Give three facts about",
    "Describe",
)
_WORDS = (
    "light",
    "water",
    "stone",
    "river",
    "bread",
    "number",
    "music",
    "winter",
    "engine",
    "garden",
    "mirror",
    "harbour",
    "letter",
    "planet",
    "silver",
    "forest",
    "window",
    "market",
    "island",
    "shadow",
    "copper",
    "bridge",
    "thunder",
    "paper",
    "orange",
    "castle",
    "doctor",
    "candle",
    "summer",
    "village",
    "compass",
    "needle",
    "history",
    "morning",
    "circle",
    "justice",
    "feather",
    "machine",
    "kitchen",
    "victory",
    "distance",
    "language",
    "mountain",
    "question",
    "telescope",
)
_IDS = (100, 20_000)
"""Token ids are drawn from here: above the special tokens of most vocabularies, and below their ends."""


def texts(count: int, seed: int, shortest: int = 3, longest: int = 8) -> list[str]:
    """``count`` distinct texts of ``shortest`` to ``longest`` words after an opening; they differ from the first word on."""
    draw = random.Random(f"texts {seed} {count} {longest}")
    found: list[str] = []
    for number in range(count):
        words = [draw.choice(_WORDS) for _ in range(draw.randint(shortest, longest))]
        found.append(f"{number + 1}. {draw.choice(_OPENINGS)} {' '.join(words)}: ")
    return found


def words(count: int, seed: int, name: str = "") -> list[str]:
    """``count`` words, the same for the same seed and name."""
    draw = random.Random(f"words {seed} {name}")
    return [draw.choice(_WORDS) for _ in range(count)]


def ids(count: int, seed: int, name: str = "", highest: int | None = None) -> tuple[int, ...]:
    """``count`` token ids, below ``highest`` where it is given."""
    draw = random.Random(f"ids {seed} {name}")
    low, high = _IDS
    if highest is not None:
        high = highest
        low = min(low, high // 2)
    return tuple(draw.randrange(low, high) for _ in range(count))


def of_length(api: Api, sampling: Sampling, length: int, seed: int, name: str, highest: int | None) -> Prompt:
    """A prompt of ``length`` tokens; two of the same name and seed are prefixes of each other.

    Token ids where the server takes them. Else words, whose number is searched by the count of tokens that the server
    reports, and the nearest is taken; UsageError where it reports none.
    """
    if api.ids:
        return ids(length, seed, name, highest)
    held = words(max(length, 16), seed, name)
    low, high = 1, len(held)
    best, distance = held[:1], None
    while low <= high:
        middle = (low + high) // 2
        text = " ".join(held[:middle])
        counted = api.generate([text], Sampling(max_new_tokens=1, logprobs=False, extra=sampling.extra))[
            0
        ].prompt_tokens
        if counted is None:
            raise UsageError(
                f"{api.transport.url}: lengths are in tokens, and this server neither takes token ids nor reports a "
                "prompt's tokens: leave out the test modes prefix and radix_cache"
            )
        if distance is None or abs(counted - length) < distance:
            best, distance = held[:middle], abs(counted - length)
        if counted == length:
            break
        low, high = (middle + 1, high) if counted < length else (low, middle - 1)
    return " ".join(best)
