"""Run a target the way that goldens need it: one request alone or several in a batch, step by step.

A language model takes step 0 (prefill of the prompt) and then single-token decode steps with its KV cache. Any other
module has step 0 alone.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import detinfer
from detinfer import bits
from detinfer.errors import DetinferError, TargetError
from detinfer.goldens import tree
from detinfer.goldens.tree import Node
from detinfer.models.targets import device_of

_OWN, _TORCH = (Path(str(package.__file__)).parent for package in (detinfer, torch))

Around = Callable[[int], AbstractContextManager[Any]]
"""``around(step)`` is entered for the forward pass of each step."""


class Target(Protocol):
    """What the engine needs of ``detinfer.models.targets.Target``."""

    spec: str
    kind: str
    module: nn.Module
    inputs: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass
class Request:
    """One request, never padded: ``tokens`` of a language model or ``arguments`` of any other module.

    ``follow`` are the tokens fed at the decode steps: chosen greedily when it is recorded, replayed afterwards.
    """

    tokens: tuple[int, ...] = ()
    follow: tuple[int, ...] = ()
    arguments: Node | None = None
    steps: int = 1

    def company(self) -> tuple[Any, ...]:
        """Requests that can stand in one batch have the same."""
        if self.arguments is None:
            return (len(self.tokens), self.steps)
        shapes = [(path, tuple(t.shape), str(t.dtype)) for path, t in tree.tensors(self.arguments)]
        values = tree.map_tensors(self.arguments, lambda *_: None)
        return (repr(shapes), repr(values))


@bits.unseen
def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The token of the largest logit at the last position, ties to the lower id: [B, S, V] -> int64 [B]."""
    last = logits[:, -1, :].float()
    best = last.amax(dim=-1, keepdim=True)
    ids = torch.arange(last.shape[-1], device=last.device)
    return torch.where(last == best, ids, last.shape[-1]).amin(dim=-1)


def run(target: Target, batch: Sequence[Request], around: Around | None = None) -> list[Node]:
    """Run one batch of requests of equal company; the node of each step's result, in order.

    A language model's result is its logits, [B, S, V] at step 0 and [B, 1, V] after; requests without ``follow``
    choose their own tokens greedily.
    """
    around = around or (lambda _: nullcontext())
    if target.kind != "causal_lm":
        return [_run_module(target, batch, around)]
    return [{"tensor": logits} for logits in run_language_model(target, batch, around)[0]]


def run_language_model(
    target: Target, batch: Sequence[Request], around: Around
) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
    """Logits of every step and the tokens that greedy decoding chooses at every step, request by request."""
    device = device_of(target.module)
    ids = torch.tensor([request.tokens for request in batch], dtype=torch.int64, device=device)
    cache: Any = None
    results: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    for step in range(batch[0].steps):
        with around(step):
            output = target.module(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        results.append(output.logits)
        chosen.append(greedy(output.logits))
        forced = [request.follow[step] for request in batch if len(request.follow) > step]
        whole = len(forced) == len(batch)
        ids = torch.tensor(forced, dtype=torch.int64, device=device)[:, None] if whole else chosen[-1][:, None]
    picked = torch.stack(chosen, dim=1).tolist()
    return results, [tuple(row) for row in picked]


def _run_module(target: Target, batch: Sequence[Request], around: Around) -> Node:
    nodes = [request.arguments for request in batch]
    first = nodes[0]
    assert first is not None
    held = [dict(tree.tensors(node)) for node in nodes if node is not None]
    joined = first
    if len(held) > 1:
        # The factory's protocol: every tensor of a request has its batch dimension in front.
        joined = tree.map_tensors(first, lambda path, _: torch.cat([one[path] for one in held], 0))
    # A module may write into what it is given: the request is asked again.
    args, kwargs = tree.decode(tree.map_tensors(joined, lambda _, t: t.clone()))
    with around(0):
        try:
            output = target.module(*args, **kwargs)
        except DetinferError:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            if Path(frames[-1].filename).is_relative_to(_OWN):
                raise  # a fault of detinfer's, and no answer of the module's
            at = next((f for f in reversed(frames) if not Path(f.filename).is_relative_to(_TORCH)), frames[-1])
            raise TargetError(
                f"target {target.spec}: its forward raised {type(error).__name__}: {error} (line {at.lineno} of "
                f"{at.filename}) on a batch of {len(batch)}; a module has to take batches of any size"
            ) from error
    try:
        return tree.encode(output)
    except tree.NotEncodable as error:
        raise TargetError(
            f"the module's output cannot be compared: {error}; return tensors in tuples or dicts"
        ) from error


def module_requests(target: Target) -> list[Request]:
    """The requests that a module's factory gave, checked: tensors with a batch dimension of 1 in front."""
    found = []
    for index, (args, kwargs) in enumerate(target.inputs):
        try:
            node = tree.encode((tuple(args), dict(kwargs)))
        except tree.NotEncodable as error:
            raise TargetError(f"request {index} cannot be recorded: {error}") from error
        for path, tensor in tree.tensors(node):
            if tensor.dim() == 0 or tensor.shape[0] != 1:
                raise TargetError(
                    f"request {index}, {path}: shape {list(tensor.shape)}; every tensor of a request needs a batch "
                    f"dimension of size 1 in front"
                )
        found.append(Request(arguments=node))
    return found
