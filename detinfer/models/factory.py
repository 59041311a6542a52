"""Targets of your own: ``package.module:factory`` names a function that returns ``(module, requests)``.

``module`` is an ``nn.Module``. ``requests`` is a list that is not empty; each request is a tensor, a tuple of
arguments or a dict of keyword arguments, and in each, every tensor has its batch dimension in front, of size 1.
A transformers causal language model may be returned alone: its requests are prompts.

The function may take ``seed``; torch's generator is seeded with it before the call in either case.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from detinfer.errors import DetinferError, TargetError
from detinfer.models.targets import Inputs, Loaded, tensors

EXPECTED = (
    "a factory returns (module, requests): an nn.Module and a non-empty list of requests, each a tensor, a tuple of "
    "arguments or a dict of keyword arguments; or it returns a transformers causal language model alone"
)


def load(spec: str, dtype: torch.dtype | None, seed: int) -> Loaded:
    """Call the factory; TargetError when it cannot be found, raises, or returns something else than ``EXPECTED``."""
    made = _call(spec, _find(spec), seed)
    if _is_causal_lm(made):
        if not _is_mostly(made, dtype):
            for parameter in made.parameters():  # not its buffers: tables of rotary positions are fp32 in every dtype
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        return Loaded("causal_lm", made)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise TargetError(f"target {spec} returned {_describe(made)}: {EXPECTED}")
    module, requests = made
    if not isinstance(requests, list) or not requests:
        what = "an empty list" if requests == [] else _describe(requests)
        raise TargetError(f"target {spec} returned {what} as its requests: {EXPECTED}")
    inputs = [_request(spec, number, request) for number, request in enumerate(requests)]
    if not _is_mostly(module, dtype):
        module = module.to(dtype)
    if dtype is not None:
        inputs = [(_cast(args, dtype), _cast(kwargs, dtype)) for args, kwargs in inputs]
    return Loaded("module", module, inputs=inputs)


def _is_mostly(module: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether nothing has to be cast: what a factory keeps in another dtype on purpose stays in it."""
    counts: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return dtype is None or (bool(counts) and max(counts, key=lambda one: counts[one]) is dtype)


def _find(spec: str) -> Callable[..., Any]:
    name, _, path = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # stays, as with python -m: the module may import more when it runs
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name + ".").startswith(error.name + "."):
            raise TargetError(f"target {spec}: no module {error.name}; looked in {here} and on sys.path") from error
        raise TargetError(f"target {spec}: importing {name} failed: {_message(error)}") from error
    except Exception as error:
        raise TargetError(f"target {spec}: importing {name} failed: {_message(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise TargetError(f"target {spec}: {name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise TargetError(f"target {spec}: {path} is {_describe(found)}, not a function: {EXPECTED}")
    return found  # type: ignore[no-any-return]


def _call(spec: str, factory: Callable[..., Any], seed: int) -> Any:
    try:
        takes_seed = "seed" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # builtins have no signature
        takes_seed = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return factory(seed=seed) if takes_seed else factory()
        except DetinferError:
            raise
        except Exception as error:
            raise TargetError(f"target {spec} raised {_message(error)}") from error


def _is_causal_lm(made: Any) -> bool:
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(made, nn.Module):
        return False
    return isinstance(made, transformers.PreTrainedModel) and type(made).__name__.endswith(
        ("ForCausalLM", "LMHeadModel")
    )


def _request(spec: str, number: int, request: Any) -> Inputs:
    if isinstance(request, torch.Tensor):
        found: Inputs = ((request,), {})
    elif isinstance(request, tuple):
        found = (request, {})
    elif isinstance(request, dict) and all(isinstance(key, str) for key in request):
        found = ((), request)
    else:
        raise TargetError(f"target {spec}: request {number} is {_describe(request)}: {EXPECTED}")
    held = tensors(found)
    if not held:
        raise TargetError(f"target {spec}: request {number} holds no tensor")
    for t in held:
        if t.dim() == 0 or t.shape[0] != 1:
            raise TargetError(
                f"target {spec}: request {number} holds a tensor of shape {list(t.shape)}; each needs a batch "
                f"dimension of size 1 in front"
            )
    return found


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    if type(value) is tuple:
        return tuple(_cast(item, dtype) for item in value)
    return value


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
