"""Ways of running a language model's requests that must not change a bit: each gives logits whose rows are known.

The reference of every way is the same: the request alone, prefill then one token at a time. ``Rows`` says what of a call's
logits belongs to which request and at which position, so that one table of expected rows serves all of them. A
row depends on its own token and those before it alone, so a prefix of a request is a request too.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from detinfer import bits
from detinfer.collectives.calls import PATHS, steered
from detinfer.goldens.runner import Request, Target
from detinfer.models.decoder import Decoder, communicated, communicates
from detinfer.models.parallel import AllReduce


@dataclass(frozen=True)
class Part:
    """Positions ``start`` to ``end`` of a request in one row of a batch, its tokens from ``at`` on.

    Of the row's keys the request's own begin at ``gap``, and the first ``keys`` of them are its first positions (None:
    all of them).
    """

    request: int
    start: int
    end: int
    at: int = 0
    gap: int = 0
    keys: int | None = None


@dataclass(frozen=True)
class Rows:
    """One call's logits [B, S, vocabulary], what is in each of its rows, and how they came to be.

    ``call``: which of the model's calls it was, counted from the end as they were when it was handed out.
    """

    how: str
    parts: list[Part]
    logits: torch.Tensor
    call: int = -1

    @property
    def places(self) -> list[tuple[int, int]]:
        """(request, position) of each row of ``flat``."""
        return [(part.request, position) for part in self.parts for position in range(part.start, part.end)]

    def flat(self) -> torch.Tensor:
        """The rows of logits that belong to a request: [rows, vocabulary]."""
        held = [self.logits[row, p.at : p.at + p.end - p.start] for row, p in enumerate(self.parts)]
        return torch.cat(held)


class Model:
    """A language model as the ways call it, and every request as one row of tokens: the prompt and what was decoded."""

    def __init__(self, target: Target, requests: Sequence[Request]) -> None:
        self.module: Any = target.module
        self.tokens = [[*request.tokens, *request.follow[: request.steps - 1]] for request in requests]
        self.prompts = [len(request.tokens) for request in requests]
        self._takes = inspect.signature(self.module.forward).parameters
        self._device = next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def slides(self) -> bool:
        """Whether some layers see the last positions alone."""
        kinds = getattr(getattr(self.module, "config", None), "layer_types", None) or ()
        return "sliding_attention" in kinds

    @property
    def ranked(self) -> bool:
        """Whether the model is cut over several ranks: a built-in one, or transformers' by torch.distributed."""
        built = any(isinstance(part, AllReduce) and part.ranks.size > 1 for part in self.module.modules())
        return built or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)

    @property
    def holes_count(self) -> bool:
        """Whether attention gives a masked key between others a place of its own, as detinfer's order on a GPU does."""
        return self._device.type == "cuda"

    def takes(self, *names: str) -> bool:
        """Whether ``forward`` has parameters of these names."""
        return all(name in self._takes for name in names)

    def ids(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """int64 [rows, length] on the model's device."""
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def __call__(self, rows: Sequence[Sequence[int]], cache: Any = None, **more: Any) -> tuple[torch.Tensor, Any]:
        """Logits [B, S, vocabulary] of rows of equal length, and the KV cache after them."""
        output = self.module(input_ids=self.ids(rows), past_key_values=cache, use_cache=True, **more)
        return output.logits, output.past_key_values


Way = Callable[[Model, random.Random], Iterator[Rows]]


def company(model: Model, rng: random.Random, most: int) -> list[int]:
    """Requests, each perhaps several times, whose prompts have one length."""
    first = rng.randrange(len(model.prompts))
    alike = [i for i, length in enumerate(model.prompts) if length == model.prompts[first]]
    return [rng.choice(alike) for _ in range(rng.randint(2, most))]


def permutation(model: Model, rng: random.Random) -> Iterator[Rows]:
    """One batch twice, its rows in another order the second time."""
    batch = company(model, rng, 16)
    turned = batch[::-1] if batch[::-1] != batch else [*batch[1:], batch[0]]
    for order in (batch, turned):
        logits, _ = model([model.tokens[i][: model.prompts[i]] for i in order])
        yield Rows(f"rows {order}", [Part(i, 0, model.prompts[i]) for i in order], logits)


def prefill_decode(model: Model, rng: random.Random) -> Iterator[Rows]:
    """What was decoded token by token, now in one prefill with the prompt."""
    batch = company(model, rng, 4)
    logits, _ = model([model.tokens[i] for i in batch])
    length = len(model.tokens[batch[0]])
    yield Rows(f"prefill of {length} tokens", [Part(i, 0, length) for i in batch], logits)


def chunks(model: Model, rng: random.Random) -> Iterator[Rows]:
    """The prompt prefilled in pieces, cut at random."""
    batch = company(model, rng, 4)
    length = len(model.tokens[batch[0]])
    cuts = sorted(rng.sample(range(1, length), min(rng.randint(1, 3), length - 1)))
    cache = None
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        logits, cache = model([model.tokens[i][start:end] for i in batch], cache)
        yield Rows(f"cut at {cuts}", [Part(i, start, end) for i in batch], logits)


def speculative(model: Model, rng: random.Random) -> Iterator[Rows]:
    """Several tokens in one step after a prefill, as when a draft is checked; then wrong ones, taken back."""
    batch = company(model, rng, 4)
    start, end = model.prompts[batch[0]], len(model.tokens[batch[0]])
    logits, cache = model([model.tokens[i][:start] for i in batch])
    step = min(rng.randint(2, 8), end - start)
    logits, cache = model([[rng.choice(model.tokens[i]) for _ in range(step)] for i in batch], cache)
    crop(cache, start)
    logits, cache = model([model.tokens[i][start : start + step] for i in batch], cache)
    how = f"{step} tokens in one step after {start}, {step} others taken back before"
    yield Rows(how, [Part(i, start, start + step) for i in batch], logits)


def prefix(model: Model, rng: random.Random) -> Iterator[Rows]:
    """A prefix from the cache of another run: one that went on otherwise and was cut back."""
    request = rng.randrange(len(model.prompts))
    tokens = model.tokens[request]
    kept = rng.randrange(1, len(tokens))
    other = rng.choice(model.tokens)
    _, cache = model([[*tokens[:kept], *other[: rng.randint(1, len(other))]]])
    crop(cache, kept)
    logits, _ = model([tokens[kept:]], cache)
    yield Rows(f"{kept} tokens from a warm cache", [Part(request, kept, len(tokens))], logits)


def crop(cache: Any, length: int) -> None:
    """Cut a KV cache back to its first ``length`` positions: transformers' or a built-in model's."""
    if hasattr(cache, "crop"):
        if (more := cache.get_seq_length() - length) > 0:
            cache.crop(-more)  # how many to remove, in every version of transformers
        return
    for index, (keys, values) in cache.layers.items():
        cache.layers[index] = keys[:, :, :length].clone(), values[:, :, :length].clone()


def static_cache(model: Model, rng: random.Random) -> Iterator[Rows]:
    """A KV cache of a fixed size, larger than needed, in place of one that grows."""
    from transformers import StaticCache

    batch = company(model, rng, 4)
    start, end = model.prompts[batch[0]], len(model.tokens[batch[0]])
    size = end + rng.randint(0, 40)
    cache = StaticCache(config=model.module.config, max_cache_len=size)
    for first, last in [(0, start), *((i, i + 1) for i in range(start, end))]:
        logits, _ = model([model.tokens[i][first:last] for i in batch], cache)
        yield Rows(f"{size} slots", [Part(i, first, last) for i in batch], logits)


def left_padding(model: Model, rng: random.Random) -> Iterator[Rows]:
    """Prompts of several lengths in one batch, padded in front, then decoded."""
    yield from _padded(model, rng, left=True)


def right_padding(model: Model, rng: random.Random) -> Iterator[Rows]:
    """Prompts of several lengths in one batch, padded behind, then decoded."""
    yield from _padded(model, rng, left=False)


def _padded(model: Model, rng: random.Random, left: bool) -> Iterator[Rows]:
    batch = [rng.randrange(len(model.prompts)) for _ in range(rng.randint(2, 6))]
    lengths = [rng.randint(1, model.prompts[i]) for i in batch]
    width = max(lengths) + rng.randint(0, 3)
    filler = [rng.choice(model.tokens[0]) for _ in range(width)]  # what a masked position holds must not matter
    rows, masks, positions = [], [], []
    for i, length in zip(batch, lengths, strict=True):
        own, gap = model.tokens[i][:length], width - length
        rows.append([*filler[:gap], *own] if left else [*own, *filler[:gap]])
        masks.append([0] * gap + [1] * length if left else [1] * length + [0] * gap)
        positions.append([0] * gap + list(range(length)) if left else [*range(length), *[length - 1] * gap])
    how = f"lengths {lengths} padded {'in front' if left else 'behind'} to {width}"
    logits, cache = model(rows, attention_mask=model.ids(masks), position_ids=model.ids(positions))
    rows_of = list(zip(batch, lengths, strict=True))
    if left:
        yield Rows(how, [Part(i, 0, n, at=width - n, gap=width - n) for i, n in rows_of], logits)
    else:
        yield Rows(how, [Part(i, 0, n) for i, n in rows_of], logits)
    if not left and (model.slides or model.holes_count):
        # A window counts the padding between a prompt and what follows it, and so does attention's order on a GPU:
        # another question to the model.
        return
    for step in range(min(1 + _PADDED_STEPS, *(len(model.tokens[i]) - n for i, n in rows_of))):
        for mask in masks:
            mask.append(1)
        logits, cache = model(
            [[model.tokens[i][n + step]] for i, n in rows_of],
            cache,
            attention_mask=model.ids(masks),
            position_ids=model.ids([[n + step] for _, n in rows_of]),
        )
        gaps = [{"gap": width - n} if left else {"keys": n} for n in lengths]
        parts = [Part(i, n + step, n + step + 1, **gap) for (i, n), gap in zip(rows_of, gaps, strict=True)]
        yield Rows(f"{how}, {step + 1} decoded", parts, logits)


_PADDED_STEPS = 3
"""Decode steps after the first that follow a padded prefill."""


def threads(model: Model, rng: random.Random) -> Iterator[Rows]:
    """Other numbers of threads."""
    request, before = rng.randrange(len(model.prompts)), torch.get_num_threads()
    try:
        for count in sorted({1, 2, 3, before} - {before}):
            torch.set_num_threads(count)
            logits, _ = model([model.tokens[request]])
            yield Rows(f"{count} threads", [Part(request, 0, len(model.tokens[request]))], logits)
    finally:
        torch.set_num_threads(before)


def collectives(model: Model, rng: random.Random) -> Iterator[Rows]:
    """Every sum over ranks by each path in turn, whatever its size; in a built-in model also in one call with the norm."""
    batch = company(model, rng, 4)
    fused = isinstance(model.module, Decoder) and communicates(model.module)
    for path in PATHS["all_reduce"]:
        for joined in (False, True) if fused else (False,):
            with steered(path), communicated(model.module) if joined else nullcontext():
                logits, _ = model([model.tokens[i] for i in batch])
            how = f"sums over ranks by {path}{', with the next norm in one call' if joined else ''}"
            yield Rows(how, [Part(i, 0, len(model.tokens[i])) for i in batch], logits)


def compiled(model: Model, rng: random.Random) -> Iterator[Rows]:
    """The model made by torch.compile: under a policy it runs as it was written."""
    batch = company(model, rng, 4)

    def forward(ids: torch.Tensor) -> Any:
        return model.module(input_ids=ids, use_cache=True).logits

    logits = torch.compile(forward)(model.ids([model.tokens[i] for i in batch]))
    yield Rows(f"torch.compile, batch {len(batch)}", [Part(i, 0, len(model.tokens[i])) for i in batch], logits)


@bits.unseen
def expected(results: dict[tuple[int, int], Any], requests: Sequence[Request]) -> list[torch.Tensor]:
    """By request, the logits of every position [positions, vocabulary], from each step's result alone."""
    found = []
    for index, request in enumerate(requests):
        steps = [results[index, step]["tensor"][0] for step in range(request.steps)]
        found.append(torch.cat(steps))
    return found
