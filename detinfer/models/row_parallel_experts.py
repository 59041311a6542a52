"""Mixtures of experts of scope ``tp``: the same bits at every tensor-parallel size.

An expert's inner columns are what its down projection adds up, so they are cut into G groups as a row-parallel layer's
inputs are (``row_parallel``), whatever the number of ranks. For each group and token the chosen experts' parts are joined in
order of top-k rank, unrounded in float32: what the contract has a rank do that holds this group alone. Then the groups are
joined by the tree, the ranks' subtrees over the wire, and the result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detinfer.errors import RefusedError, TargetError
from detinfer.models.ranks import Ranks
from detinfer.models.row_parallel import check, groups, local, tree
from detinfer.ops import moe
from detinfer.policy.transformers_moe import layer_of

STYLE = "moe_tp_experts"
"""The style of transformers' plans that cuts every expert by its inner columns."""


class ExpertSum:
    """The forward of a transformers experts module: x [tokens, hidden], chosen and weights [tokens, k] to [tokens, hidden].

    The module has its own share of the weights: gate_up_proj [experts, 2 * inner / ranks, hidden], the gate's columns before
    the others, and down_proj [experts, hidden, inner / ranks].
    """

    def __init__(self, name: str, module: Any, ranks: Ranks, asked: int | None) -> None:
        self._up, self._down = local(module.gate_up_proj), local(module.down_proj)
        width, inner = self._down.shape[2], module.down_proj.shape[2]
        if inner != width * ranks.size or self._up.shape[1] != 2 * width:
            raise TargetError(f"scope tp: the {inner} inner columns of {name} are not shared out evenly")
        count = groups(inner, asked)
        check(count, ranks.size)
        self._count, self._gate = count // ranks.size, layer_of(module).gate
        self._name, self._ranks = name, ranks

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self._ranks.all_reduce(self.own(x, chosen, weights), self._name, "rank_tree").to(x.dtype)

    def own(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """This rank's groups, each with its token's experts joined, then joined themselves: float32 [tokens, hidden]."""
        shape = (self._count, *chosen.shape, self._down.shape[1])
        found = torch.empty(shape, dtype=torch.float32, device=x.device)
        for expert in sorted(set(chosen.flatten().tolist())):
            token, place = torch.nonzero(chosen == expert, as_tuple=True)
            inner = self._gate(F.linear(x[token], self._up[expert]))
            # Widening is exact, so a chain of the wide values is that of the narrow ones, without its last rounding.
            columns = zip(inner.chunk(self._count, 1), self._down[expert].chunk(self._count, 1), strict=True)
            for group, (part, weight) in enumerate(columns):
                found[group, token, place] = F.linear(part.float(), weight.float().contiguous())
        return tree([moe.combine(weights, one, torch.float32) for one in found])


def refuse(spec: str, names: list[str], module: nn.Module) -> None:
    """RefusedError where one of these experts modules has sums that the contract does not order for every size."""
    parts = dict(module.named_modules())
    for name in names:
        part: Any = parts[name]
        layout = [getattr(part, what, None) for what in ("has_gate", "is_concatenated", "has_bias", "is_transposed")]
        why = ""
        if hasattr(parts[name.rpartition(".")[0]], "shared_experts"):
            why = "a shared expert joins the others before the sum over ranks, and its groups need not be as many"
        elif layout != [True, True, False, False]:
            why = f"{type(part).__name__} has biases, no gate, or weights that lie otherwise"
        where = part.down_proj.device
        if not why and where.type != "cpu":
            raise RefusedError(
                f"target {spec} on {where}: scope tp of a mixture of experts runs on CPU in this version; use scope batch"
            )
        if why:
            raise RefusedError(f"target {spec}: scope tp has no order for {name}: {why}; use scope batch")
        layer_of(part)
