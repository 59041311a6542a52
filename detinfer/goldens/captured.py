"""Ways of running a language model that exist on a GPU alone: replays of a CUDA graph, and other streams."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from detinfer.goldens.schedules import Model, Part, Rows, company

Step = Callable[[], torch.Tensor]
"""Runs one step on tensors that stay where they are; its result is written to the same place at every replay."""


def capture(step: Step) -> tuple[Callable[[], None], torch.Tensor]:
    """(what replays it, where its result comes to be) of a step in a CUDA graph. It runs twice before, and moves on."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def graph(model: Model, rng: random.Random) -> Iterator[Rows]:
    """Decode steps replayed from one CUDA graph, on a static cache: the prompt is prefilled eagerly."""
    batch, start, end, size, cache = _drawn(model, rng)
    model([model.tokens[i][:start] for i in batch], cache)
    ids = model.ids([[model.tokens[i][start]] for i in batch])

    def step() -> torch.Tensor:
        logits: torch.Tensor = model.module(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return logits

    rewind(cache, start)
    replay, logits = capture(step)
    rewind(cache, start)
    for position in range(start, end):
        ids.copy_(model.ids([[model.tokens[i][position]] for i in batch]))
        replay()
        parts = [Part(i, position, position + 1) for i in batch]
        yield Rows(f"a graph of one step, batch {len(batch)}, {size} slots", parts, logits.clone())


def graph_eagerly(model: Model, rng: random.Random) -> Iterator[Rows]:
    """The steps of ``graph`` with no graph: the same batch, tokens and slots."""
    batch, start, end, size, cache = _drawn(model, rng)
    for first, last in [(0, start), *((i, i + 1) for i in range(start, end))]:
        logits, _ = model([model.tokens[i][first:last] for i in batch], cache)
        yield Rows(f"no graph, {size} slots", [Part(i, first, last) for i in batch], logits)


def _drawn(model: Model, rng: random.Random) -> tuple[list[int], int, int, int, Any]:
    """(requests, tokens of the prompt, of all, slots, static cache) of the steps that a graph is made of."""
    from transformers import StaticCache

    batch = company(model, rng, 4)
    start, end = model.prompts[batch[0]], len(model.tokens[batch[0]])
    size = end + rng.randint(1, 40)  # a step before the capture and the capture's own take slots that are written again
    return batch, start, end, size, StaticCache(config=model.module.config, max_cache_len=size)


def rewind(cache: Any, length: int) -> None:
    """Have a static cache go on after its first ``length`` positions: what it holds of the others is written again."""
    for layer in cache.layers:
        held = layer.cumulative_length
        if isinstance(held, torch.Tensor):
            held.fill_(length)
        else:
            layer.cumulative_length = length


def streams(model: Model, rng: random.Random) -> Iterator[Rows]:
    """Two batches at once, each on a stream of its own; then one of them on a third stream, alone."""
    batches = [company(model, rng, 4), company(model, rng, 4)]
    rows = [[model.tokens[i] for i in batch] for batch in batches]
    given = [model.ids(one) for one in rows]
    sides = [torch.cuda.Stream() for _ in range(3)]  # type: ignore[no-untyped-call]
    for side in sides:
        side.wait_stream(torch.cuda.current_stream())
    found = []
    for number, side in [(0, sides[0]), (1, sides[1]), (0, sides[2])]:
        with torch.cuda.stream(side):
            found.append((number, model.module(input_ids=given[number], use_cache=True).logits))
    for side in sides:
        torch.cuda.current_stream().wait_stream(side)
    for turn, (number, logits) in enumerate(found):
        parts = [Part(i, 0, len(model.tokens[i])) for i in batches[number]]
        yield Rows(f"stream {turn} of 3, the first two at once", parts, logits, turn - len(found))


def streams_in_turn(model: Model, rng: random.Random) -> Iterator[Rows]:
    """The batches of ``streams``, one after another on the current stream."""
    batches = [company(model, rng, 4), company(model, rng, 4)]
    for batch in batches:
        logits, _ = model([model.tokens[i] for i in batch])
        yield Rows("one after another", [Part(i, 0, len(model.tokens[i])) for i in batch], logits)
