"""The linear layers of a target by shape: what ``detinfer prove`` measures."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from detinfer.errors import TargetError
from detinfer.models import targets


class LinearShape(NamedTuple):
    """A linear layer [*, k] -> [*, n] with or without a bias."""

    k: int
    n: int
    dtype: torch.dtype
    bias: bool


def of_module(module: nn.Module, dtype: torch.dtype | None = None) -> list[LinearShape]:
    """Every shape among the torch.nn.Linear layers of a module, once each, in order of first use by name."""
    found = (
        LinearShape(layer.in_features, layer.out_features, dtype or layer.weight.dtype, layer.bias is not None)
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    )
    return list(dict.fromkeys(found))


def of_target(spec: str, dtype: torch.dtype | None = None) -> list[LinearShape]:
    """The shapes of a target; a model of transformers is built from its configuration alone, without weights.

    Raises TargetError where it cannot be loaded or has no linear layer.
    """
    if spec.startswith("hf:"):
        from detinfer.models import huggingface

        shapes = of_module(huggingface.skeleton(spec.removeprefix("hf:")), dtype)
    else:
        target = targets.load(spec, dtype)
        shapes = of_module(target.module, dtype)
    if not shapes:
        raise TargetError(f"target {spec}: it has no torch.nn.Linear layer to prove: give its shapes with --shape")
    return shapes
