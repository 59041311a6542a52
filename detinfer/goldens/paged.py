"""A paged KV cache: requests of several lengths through transformers' continuous batching, every row of logits watched.

transformers cuts prompts into pieces, packs the pieces and the decoded tokens of all requests into one row, keeps keys and
values in pages, and lets requests share the pages of a common prefix. It keeps no account of which row of logits belongs
to whom, so rows are told apart by their tokens: requests run together only where a position and its token name one.
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from detinfer.errors import InfrastructureError, RefusedError
from detinfer.goldens.schedules import Model, Part, Rows
from detinfer.models.tensor_parallel import GATHERED, styles

MOST = 6
"""Requests in one run."""


def needs(model: Model) -> str | None:
    """Why a model cannot be run so, or None."""
    if not hasattr(model.module, "generate_batch"):
        return "only transformers' models have continuous batching"
    if not hasattr(importlib.import_module("transformers.generation.configuration_utils"), "ContinuousBatchingConfig"):
        return "this transformers has no ContinuousBatchingConfig; a newer one has"
    if model.slides:
        return "its sliding windows would be counted in slots of pages"
    if (attention := str(model.module.config._attn_implementation)) != "sdpa":
        return f"its attention is {attention}, and a paged cache is read through sdpa"
    if getattr(model.module.config, "kv_lora_rank", None):
        return "transformers' pages have one width, and its keys and values have two"
    kinds = styles(model.module) if model.ranked else {}
    if any(style in GATHERED and name.endswith(("k_proj", "v_proj")) for name, style in kinds.items()):
        return "its plan gathers keys and values on every rank, and transformers' pages have room for a rank's share"
    return None


@dataclass
class Seen:
    """One forward pass of the packed batch: its tokens, their positions, where segments end, and the rows of logits."""

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    indices: list[int]
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    given: dict[str, Any] = field(default_factory=dict)
    attention: str = ""

    @property
    def keys(self) -> list[int]:
        """Where each segment's keys end among those of all; of a pass that was kept."""
        ends = self.given["cu_seq_lens_k"]
        ends = ends if isinstance(ends, torch.Tensor) else next(iter(ends.values()))  # by kind of layer
        found: list[int] = ends.tolist()
        return found


def paged(model: Model, rng: random.Random) -> Iterator[Rows]:
    """Some requests together, in pages of a random size and pieces of a random number of tokens."""
    batch, words, calls = packed(model, rng)
    for number, seen in enumerate(calls):
        rows = rows_of(seen, model.tokens, batch)
        if rows:
            parts = [Part(request, position, position + 1) for _, request, position in rows]
            yield Rows(words, parts, seen.logits[[row for row, _, _ in rows]][:, None], number - len(calls))


def packed(model: Model, rng: random.Random, keep: bool = False) -> tuple[list[int], str, list[Seen]]:
    """The run of ``paged``: its requests, how they were run, and every forward pass, with ``keep`` so as to run it again."""
    order = list(range(len(model.tokens)))
    rng.shuffle(order)
    batch = apart(model.tokens, model.prompts, order)[:MOST]
    steps = min(len(model.tokens[i]) - model.prompts[i] for i in batch) + 1
    page, most = rng.choice((4, 8, 16, 32)), rng.randint(8, 48)
    pages = sum(-(-(model.prompts[i] + steps) // page) + 1 for i in batch)
    how = _configured(
        page_size=page,
        num_blocks=2 * pages + 4,
        max_batch_tokens=most,
        max_requests_per_batch=MOST,
        use_cuda_graph=False,
        use_async_batching=False,
        auto_switch_to_flash=False,
    )
    library: Any = importlib.import_module("transformers.generation.configuration_utils")  # untyped
    greedy = library.GenerationConfig(max_new_tokens=steps, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [model.tokens[i][: model.prompts[i]] for i in batch]
    with _Watch(model.module, keep) as watch:
        # warmup: CUDA graphs alone need one.
        found = model.module.generate_batch(
            inputs=prompts, generation_config=greedy, continuous_batching_config=how, warmup=False
        )
    if len(found) < len(prompts) or any(getattr(one, "error", None) for one in found.values()):
        said = next((str(one.error) for one in found.values() if getattr(one, "error", None)), "its thread ended")
        if "is refused" in said:
            raise RefusedError(said)
        raise InfrastructureError(f"transformers' continuous batching answered {len(found)} of {len(prompts)}: {said}")
    return batch, f"{len(batch)} requests, pages of {page}, at most {most} tokens at once", watch.calls


def _configured(**settings: Any) -> Any:
    """A ContinuousBatchingConfig of the transformers that is installed, whose names have changed over time."""
    library: Any = importlib.import_module("transformers.generation.configuration_utils")
    known = inspect.signature(library.ContinuousBatchingConfig).parameters
    named = {_ONCE.get(name, name) if name not in known else name: value for name, value in settings.items()}
    return library.ContinuousBatchingConfig(**{name: value for name, value in named.items() if name in known})


_ONCE = {"page_size": "block_size"}
"""What a setting was called in transformers before; ``auto_switch_to_flash`` came with the later names."""


def apart(tokens: Sequence[Sequence[int]], prompts: Sequence[int], order: Sequence[int]) -> list[int]:
    """Requests of ``order`` that a decoded token and its position tell apart, or that agree up to there."""
    kept: list[int] = []
    for one in order:
        if all(_told(tokens[one], tokens[other], min(prompts[one], prompts[other])) for other in kept):
            kept.append(one)
    return kept


def _told(a: Sequence[int], b: Sequence[int], first: int) -> bool:
    shared = range(first, min(len(a), len(b)))
    return all(a[p] != b[p] or list(a[: p + 1]) == list(b[: p + 1]) for p in shared)


def rows_of(seen: Seen, tokens: Sequence[Sequence[int]], batch: Sequence[int]) -> list[tuple[int, int, int]]:
    """(row of logits, request, position) of each row whose segment of the packed batch is some request's.

    A segment that is nobody's follows a token that was chosen otherwise: the row that chose it has been compared.
    """
    found = []
    for row, index in enumerate(seen.indices):
        if index + 1 not in seen.ends:  # a place that this batch does not use
            continue
        start = max((end for end in seen.ends if end <= index), default=0)
        segment, first, last = seen.tokens[start : index + 1], seen.positions[start], seen.positions[index]
        owner = next((i for i in batch if list(tokens[i][first : last + 1]) == segment), None)
        if owner is not None:
            found.append((row, owner, last))
    return found


def copied(value: Any) -> Any:
    """What a forward pass is given, its tensors as copies; the cache is the one that it was."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


class _Watch:
    """Hooks on a model that keep what each forward pass of the packed batch is given and gives."""

    def __init__(self, module: Any, keep: bool) -> None:
        self.calls: list[Seen] = []
        self._keep = keep
        self._module = module
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        self._handles = [
            self._module.register_forward_pre_hook(self._before, with_kwargs=True),
            self._module.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, _: Any, __: Any, given: dict[str, Any]) -> None:
        ends = given["cu_seq_lens_q"].tolist()
        tokens, positions = given["input_ids"][0].tolist(), given["position_ids"][0].tolist()
        self.calls.append(Seen(tokens, positions, ends, given["logits_indices"].tolist()))
        if self._keep:
            self.calls[-1].given = copied(given)  # transformers writes the next pass's into the same tensors
            self.calls[-1].attention = str(self._module.config._attn_implementation)

    def _after(self, _: Any, __: Any, output: Any) -> None:
        seen, logits = self.calls[-1], output.logits[0]
        # A model that cannot leave rows out gives all of them.
        seen.logits = (logits if len(logits) == len(seen.indices) else logits[seen.indices]).clone()
