"""Which parts of a model are recorded and replayed on their own.

leaf       a module without children
attention  one call of scaled_dot_product_attention, named after the module that makes it
block      an item of an outermost ModuleList: a decoder layer
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from detinfer.errors import UsageError

Kind = Literal["leaf", "attention", "block"]
ATTENTION_SUFFIX = ".attention"


@dataclass(frozen=True)
class Unit:
    """A replay unit; ``layers`` are the KV cache layers that it reads or writes."""

    name: str
    kind: Kind
    module: nn.Module
    layers: frozenset[int]


def module_units(model: nn.Module) -> dict[nn.Module, Unit]:
    """The leaf and block units of a model, by module; a module that is used twice has its first name."""
    found: dict[nn.Module, Unit] = {}
    blocks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(block + ".") for block in blocks):
            for index, item in enumerate(module):
                inner = f"{name}.{index}"
                blocks.append(inner)
                if any(True for _ in item.children()):
                    found[item] = Unit(inner, "block", item, _cache_layers(item))
    for name, module in model.named_modules():
        if module not in found and not any(True for _ in module.children()):
            found[module] = Unit(name or "model", "leaf", module, frozenset())
    return found


def _cache_layers(module: nn.Module) -> frozenset[int]:
    # transformers tells every attention module which layer of the KV cache is its own.
    indices = (getattr(part, "layer_idx", None) for part in module.modules())
    return frozenset(index for index in indices if isinstance(index, int))


def pattern(layers: str | None) -> re.Pattern[str]:
    """The compiled ``--layers`` expression (all units when None); UsageError when it is no regular expression."""
    try:
        return re.compile(layers or "")
    except re.error as error:
        raise UsageError(f"--layers {layers!r} is no regular expression: {error}") from error
