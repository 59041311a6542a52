"""Ways of running an encoder's requests that must not change a bit: other orders, padding behind, other threads.

An encoder is a module whose requests are ``input_ids`` and ``attention_mask`` and whose result holds ``tokens`` [B, S, D]
and ``sentence`` [B, D] (``models.sentence_encoder``). The row after a request's last token is its sentence's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from detinfer import bits
from detinfer.goldens import tree
from detinfer.goldens.runner import Request, Target
from detinfer.goldens.schedules import Part, Rows

INPUTS = {"input_ids", "attention_mask"}


class Encoder:
    """An encoder as the ways call it, and the tokens of every request."""

    def __init__(self, target: Target, requests: Sequence[Request]) -> None:
        self.module: Any = target.module
        self.tokens: list[list[int]] = []
        for request in requests:
            _, named = tree.decode(request.arguments or {})
            self.tokens.append(named["input_ids"][0].tolist())
        self.device = next(self.module.parameters()).device

    def __call__(self, rows: Sequence[Sequence[int]], mask: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
        """Tokens and sentences of rows of one length."""
        ids = torch.tensor(rows, device=self.device)
        shown = torch.ones_like(ids) if mask is None else torch.tensor(mask, device=self.device)
        found: dict[str, Any] = self.module(input_ids=ids, attention_mask=shown)
        return found


def encoder(target: Target, requests: Sequence[Request]) -> Encoder | None:
    """The target as an encoder, or None where it is none."""
    if target.kind != "module":
        return None
    for request in requests:
        if request.arguments is None:
            return None
        args, named = tree.decode(request.arguments)
        if args or set(named) != INPUTS:
            return None
    return Encoder(target, requests)


@bits.unseen
def expected(results: dict[tuple[int, int], Any], requests: Sequence[Request]) -> list[torch.Tensor]:
    """By request, its tokens' rows and then its sentence's: [length + 1, D]."""
    found = []
    for index in range(len(requests)):
        alone = tree.decode(results[index, 0])
        found.append(torch.cat([alone["tokens"][0], alone["sentence"]]))
    return found


def _rows(how: str, batch: Sequence[int], lengths: Sequence[int], result: dict[str, Any]) -> Iterator[Rows]:
    pairs = list(zip(batch, lengths, strict=True))
    yield Rows(f"{how}, tokens", [Part(i, 0, n) for i, n in pairs], result["tokens"])
    yield Rows(f"{how}, sentences", [Part(i, n, n + 1) for i, n in pairs], result["sentence"][:, None])


def _company(model: Encoder, rng: random.Random, most: int) -> list[int]:
    length = len(rng.choice(model.tokens))
    alike = [i for i, tokens in enumerate(model.tokens) if len(tokens) == length]
    return [rng.choice(alike) for _ in range(rng.randint(2, most))]


def permutation(model: Encoder, rng: random.Random) -> Iterator[Rows]:
    """One batch twice, its rows in another order the second time."""
    batch = _company(model, rng, 16)
    turned = batch[::-1] if batch[::-1] != batch else [*batch[1:], batch[0]]
    for order in (batch, turned):
        lengths = [len(model.tokens[i]) for i in order]
        yield from _rows(f"rows {order}", order, lengths, model([model.tokens[i] for i in order]))


def right_padding(model: Encoder, rng: random.Random) -> Iterator[Rows]:
    """Texts of several lengths in one batch, other tokens behind the shorter ones."""
    batch = [rng.randrange(len(model.tokens)) for _ in range(rng.randint(2, 8))]
    lengths = [len(model.tokens[i]) for i in batch]
    width = max(lengths) + rng.randint(1, 9)
    filler = [rng.choice(model.tokens[0]) for _ in range(width)]  # what a masked position holds must not matter
    rows = [[*model.tokens[i], *filler[: width - n]] for i, n in zip(batch, lengths, strict=True)]
    masks = [[1] * n + [0] * (width - n) for n in lengths]
    yield from _rows(f"lengths {lengths} padded behind to {width}", batch, lengths, model(rows, masks))


def threads(model: Encoder, rng: random.Random) -> Iterator[Rows]:
    """Other numbers of threads."""
    one, before = rng.randrange(len(model.tokens)), torch.get_num_threads()
    try:
        for count in sorted({1, 2, 3, before} - {before}):
            torch.set_num_threads(count)
            yield from _rows(f"{count} threads", [one], [len(model.tokens[one])], model([model.tokens[one]]))
    finally:
        torch.set_num_threads(before)


WAYS: dict[str, Callable[[Encoder, random.Random], Iterator[Rows]]] = {
    "permutation": permutation,
    "right-padding": right_padding,
    "threads": threads,
}
"""By the name of the axis."""
