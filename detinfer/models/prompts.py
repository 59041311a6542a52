"""Prompts for language models: built-in ones, a file's, or token ids from a seeded generator.

Requests stand in one batch only when they are equally long, so the built-in prompts are all cut to one length. Texts
of your own keep theirs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detinfer.errors import TargetError, UsageError
from detinfer.models.targets import Target

COUNT = 4
LENGTH = 16

DEFAULT_PROMPTS: tuple[str, ...] = (
    (
        "The order in which numbers are added changes the last bit of their sum, because every addition rounds. A sum "
        "over a row of a thousand values can therefore have many answers, all of them close to the exact one, and a "
        "program that picks its order by the size of the batch gives a different one every time the batch changes."
    ),
    (
        "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if len(ordered) % 2 == 1:\n"
        "        return ordered[middle]\n    return (ordered[middle - 1] + ordered[middle]) / 2\n\n\nprint(median([3, 1, 4, 1, "
        "5, 9, 2, 6]))\nprint(median([2.5, 7.25]))\n"
    ),
    (
        "On the third day the fog lifted, and the crew of the lighthouse saw the ship again: two masts, no flag, and a "
        "single lantern swinging at the stern. Nobody spoke. The keeper counted the seconds between the waves, wrote the "
        "number in the book, and went down the stairs to wake the others before the tide turned."
    ),
    (
        "In 1969 the population was 4,218; by 1984 it had grown to 11,907 and by 2003 to 25,340. The average household "
        "held 2.7 people, 38.5% of them under the age of 18. Rainfall was 612 mm a year, most of it between October and "
        "March, and the mean temperature in July was 24.3 degrees."
    ),
    (
        "User: How do I boil an egg so that the yolk stays soft?\nAssistant: Bring water to a boil, lower the egg in with "
        "a spoon, and wait six and a half minutes. Then put it under cold water.\nUser: And if the egg comes straight from "
        "the fridge?\nAssistant: Give it half a minute more.\nUser: Thank you! What goes well with it?\nAssistant:"
    ),
    (
        "Le train de Lyon arrive à la gare à dix-sept heures vingt. Der Zug nach Zürich fährt um halb sechs von Gleis drei "
        "ab. El tren de Sevilla sale cada hora desde las ocho de la mañana. Il treno per Torino è in ritardo di dieci "
        "minuti, e il prossimo parte dal binario due."
    ),
    (
        "Question: A farmer has 17 sheep, and all but 9 run away. She buys 3 more at the market, sells 2 of those that she "
        "has, and finds one of the runaways on the road home. How many sheep does she have in the evening? Answer: Let us "
        "go through it step by step. At first"
    ),
    (
        "<ul>\n  <li>flour, 500 g</li>\n  <li>water, 350 ml</li>\n  <li>salt, 10 g</li>\n  <li>yeast, 3 g</li>\n</ul>\n"
        "<p>Mix everything, let it rest for <b>twelve hours</b>, fold it four times, and bake it at 240 degrees for "
        'forty minutes.</p>\n<p>See also: <a href="rye.html">rye bread</a>.</p>\n'
    ),
)
"""Each is longer than 60 tokens in SmolLM2's vocabulary."""


@dataclass(frozen=True)
class Prompt:
    """One request: the text it was made from (None where there is none) and its token ids."""

    text: str | None
    tokens: tuple[int, ...]


def prompts(
    target: Target,
    texts: Sequence[str] | None = None,
    count: int = COUNT,
    length: int = LENGTH,
    seed: int = 0,
) -> list[Prompt]:
    """The prompts of a language model.

    Without ``texts``: ``count`` built-in ones, the first ``length`` tokens of each; for a target without a tokenizer,
    token ids drawn from a generator that ``seed`` starts. With ``texts``: all of them, whole; for a target without a
    tokenizer each text is a row of token ids. Raises UsageError when a built-in prompt is too short, there are too
    few, or a text has no tokens.
    """
    if texts is not None:
        if not texts:
            raise UsageError("no prompts were given")
        return [Prompt(text, _tokens(target, text)) for text in texts]
    if count < 1 or length < 1:
        raise UsageError(f"{count} prompts of {length} tokens: at least one of one token is needed")
    if target.tokenizer is None:
        # Not torch's generator: its numbers depend on the version.
        draw = random.Random(seed)
        return [Prompt(None, tuple(draw.randrange(target.vocabulary) for _ in range(length))) for _ in range(count)]
    if count > len(DEFAULT_PROMPTS):
        raise UsageError(f"{count} prompts: {len(DEFAULT_PROMPTS)} are built in; give a file of your own for more")
    found = [Prompt(text, _tokens(target, text)[:length]) for text in DEFAULT_PROMPTS[:count]]
    if (shortest := min(len(prompt.tokens) for prompt in found)) < length:
        raise UsageError(
            f"prompts of {length} tokens: the shortest built-in one has {shortest}; give a file of your own for more"
        )
    return found


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, empty ones left out; UsageError when it cannot be read or has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not (found := [line for line in lines if line.strip()]):
        raise UsageError(f"{path}: holds no prompt; write one a line")
    return found


def _tokens(target: Target, text: str) -> tuple[int, ...]:
    if target.tokenizer is not None:
        found = tuple(target.tokenizer(text))
    else:
        try:
            found = tuple(int(word) for word in text.replace(",", " ").split())
        except ValueError as error:
            raise UsageError(
                f"prompt {_shown(text)}: {target.spec} has no tokenizer; write token ids, such as 17 4 256"
            ) from error
    if not found:
        raise UsageError(f"prompt {_shown(text)}: has no tokens")
    for token in found:
        if not 0 <= token < target.vocabulary:
            raise TargetError(
                f"prompt {_shown(text)}: token {token} is not among the {target.vocabulary} of {target.spec}"
            )
    return found


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
