"""The operation behind a difference in a paged run: its packed passes made again one after another, and watched.

transformers runs them in a thread of its own, which no watch sees. What each pass was given is kept, the cache with it: the
same passes in the same order write every key before it is read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from detinfer.goldens import paged
from detinfer.goldens.cause import align
from detinfer.goldens.cause.first import Parts
from detinfer.goldens.cause.locate import Located, by_spans, locate
from detinfer.goldens.cause.operations import Watch
from detinfer.goldens.paged import Seen
from detinfer.goldens.schedules import Model
from detinfer.models.ranks import ALONE, Ranks


def find(model: Model, rng: random.Random, request: int, ranks: Ranks = ALONE) -> Located | None:
    """The first operation of the paged run of ``rng`` that gives ``request`` other bytes than alone; None if none does."""
    batch, words, calls = paged.packed(model, rng, keep=True)
    if request not in batch:
        return None
    tokens = model.tokens[request]
    sizes = [(len(seen.tokens), seen.keys[-1], len(seen.indices)) for seen in calls]
    length = align.lonely(len(tokens), sorted({size for three in sizes for size in three}))
    padded = [*tokens, *[tokens[-1]] * (length - len(tokens))]  # what comes after changes nothing before
    spans = [_spans(seen, model.tokens, batch, request) for seen in calls]
    one = align.Sizes(1, length, length)
    packed = by_spans(
        one, [(align.Sizes(1, n, keys), found) for (n, keys, _), (found, _) in zip(sizes, spans, strict=True)]
    )
    chosen = by_spans(one, [(align.Sizes(1, n, 0), found) for (_, _, n), (_, found) in zip(sizes, spans, strict=True)])

    def again(mode: Watch) -> None:
        with _attention(model.module, calls[0].attention):
            for number, seen in enumerate(calls):
                mode.call = number
                model.module(**paged.copied(seen.given))

    found = locate(lambda _: _prefill(model, padded), again, _either(packed, chosen), integers=False, ranks=ranks)
    return None if found is None else found.noted(words)


def _spans(seen: Seen, tokens: list[list[int]], batch: list[int], request: int) -> tuple[list[Any], list[Any]]:
    """Where ``request`` is in a pass: among its tokens, and among the rows that the head is given."""
    packed, chosen = [], []
    for row, owner, last in paged.rows_of(seen, tokens, batch):
        if owner != request:
            continue
        index = seen.indices[row]
        segment = seen.ends.index(index + 1)
        start = max((end for end in seen.ends if end <= index), default=0)
        gap = seen.keys[segment - 1] if segment else 0
        first = seen.positions[start]
        packed.append(align.Span(0, start, first, index + 1 - start, gap, last + 1))
        chosen.append(align.Span(0, row, last, 1))
    return packed, chosen


def _either(packed: Parts, chosen: Parts) -> Parts:
    """The parts among all tokens, or where a tensor has none, among the rows that the head is given."""

    def parts(call: int, alone: torch.Tensor, other: torch.Tensor) -> Iterator[align.Pair]:
        yield from list(packed(call, alone, other)) or chosen(call, alone, other)

    return parts


@contextmanager
def _attention(module: Any, name: str) -> Iterator[None]:
    """The attention that transformers reads its pages by."""
    before = module.config._attn_implementation
    module.set_attn_implementation(name)
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def _prefill(model: Model, tokens: list[int]) -> None:
    model([tokens])
