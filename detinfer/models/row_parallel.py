"""Row-parallel layers of scope ``tp``: the same bits at every tensor-parallel size.

A layer's K inputs are cut into G groups, whatever the number of ranks. Each group is one chain in float32, the groups
are joined by a tree (neighbours first), the ranks' subtrees over the wire in float32 by the same tree, and the bias is
added and the result rounded once. N ranks hold G / N groups each: the tree is the same one when that is a power of two,
or when one rank holds them all.

Everything else of a cut model computes whole results: columns of a product, heads, gathered logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detinfer.errors import RefusedError, TargetError
from detinfer.models.ranks import Ranks
from detinfer.models.tensor_parallel import SUMMED, is_transformers, styles

MOST_GROUPS = 8

_ROWS, _EMBEDDING = "rowwise", "embedding_rowwise"


def groups(terms: int, asked: int | None = None) -> int:
    """Into how many groups a layer of ``terms`` inputs is cut: the largest power of two up to 8 that divides them.

    ``asked`` is a policy's own number. TargetError where it does not divide the inputs.
    """
    if asked is None:
        return max(n for n in (1, 2, 4, MOST_GROUPS) if terms % n == 0)
    if terms % asked:
        raise TargetError(f"{terms} inputs of a row-parallel layer cannot be cut into {asked} groups of one size")
    return asked


def check(count: int, size: int) -> None:
    """TargetError where ``size`` ranks cannot share ``count`` groups so that their subtrees join to the whole tree."""
    share = count // size
    if size > 1 and (count % size or share & (share - 1)):
        fits = [n for n in range(1, count + 1) if n == 1 or (count % n == 0 and not (count // n) & (count // n - 1))]
        raise TargetError(
            f"scope tp: {size} ranks cannot share {count} groups of a sum; {', '.join(map(str, fits))} can. Ask for others "
            f"when recording: --groups {size} serves 1 and {size} ranks"
        )


def tree(parts: list[Tensor]) -> Tensor:
    """Neighbours 2i and 2i + 1 joined, an odd last one moved up, until one is left."""
    while len(parts) > 1:
        joined = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
        parts = joined + parts[len(joined) * 2 :]
    return parts[0]


class RowSum:
    """A row-parallel linear layer's forward: x [..., K / ranks] of this rank to the whole result [..., N]."""

    def __init__(self, name: str, module: nn.Linear, ranks: Ranks, asked: int | None) -> None:
        weight, bias = local(module.weight), None if module.bias is None else local(module.bias)
        count = groups(module.in_features, asked)
        check(count, ranks.size)
        if weight.shape[1] * ranks.size != module.in_features:
            raise TargetError(f"scope tp: the {module.in_features} inputs of {name} are not shared out evenly")
        # Widening is exact, so a chain of them is that of the narrow values, without its last rounding.
        self._weights = [part.float().contiguous() for part in weight.chunk(count // ranks.size, dim=1)]
        self._bias = None if bias is None else bias.float()
        self._name, self._ranks = name, ranks

    def __call__(self, x: Tensor) -> Tensor:
        return self.rounded(self._ranks.all_reduce(self.own(x), self._name, "rank_tree"), x.dtype)

    def own(self, x: Tensor) -> Tensor:
        """This rank's groups, joined: float32 [..., N]."""
        parts = x.chunk(len(self._weights), dim=-1)
        return tree([F.linear(part.float(), weight) for part, weight in zip(parts, self._weights, strict=True)])

    def rounded(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """The result of all ranks' sum: the bias added, and rounded once."""
        return (total if self._bias is None else total + self._bias).to(dtype)


class RowLookup:
    """An embedding whose rows are shared out: the rank that has a row gives it, a missing one is -0."""

    def __init__(self, name: str, module: nn.Embedding, ranks: Ranks) -> None:
        self._weight, self._name, self._ranks = local(module.weight), name, ranks
        sizes = ranks.share(self._weight.shape[0])
        self._first = sum(sizes[: ranks.rank])

    def __call__(self, ids: Tensor) -> Tensor:
        place = ids - self._first
        mine = (place >= 0) & (place < self._weight.shape[0])
        rows = F.embedding(torch.where(mine, place, 0), self._weight)
        return self._ranks.all_reduce(torch.where(mine[..., None], rows, -0.0), self._name, "rank_tree")


def local(weight: Any) -> Tensor:
    """What this rank holds of a weight: the weight itself, or its share where transformers has cut it."""
    held: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return held.detach()


def keep(spec: str, module: Any, ranks: Ranks, asked: int | None = None) -> None:
    """Give a transformers model the row-parallel layers of scope ``tp``, in place.

    ``asked`` is the policy's number of groups. RefusedError for a model whose plan has other sums over ranks.
    """
    from detinfer.models import row_parallel_experts as experts

    plan = styles(module) if is_transformers(module) else {}
    known = (_ROWS, _EMBEDDING, experts.STYLE)
    others = sorted({style for style in plan.values() if style in SUMMED and style not in known})
    if not plan or others:
        why = f"its plan has {', '.join(others)}" if plan else "transformers has no tensor-parallel plan for it"
        raise RefusedError(
            f"target {spec}: scope tp is kept for transformers' language models ({why}): use scope batch"
        )
    experts.refuse(spec, [name for name, style in plan.items() if style == experts.STYLE], module)
    parts = dict(module.named_modules())
    ranks.add_by(None)
    for name, style in plan.items():
        part = parts[name]
        forward: Callable[..., Tensor] | None = None
        if style == _ROWS and isinstance(part, nn.Linear):
            forward = RowSum(name, part, ranks, asked)
        elif style == _EMBEDDING and ranks.size > 1:
            forward = RowLookup(name, part, ranks)
        elif style == experts.STYLE:
            forward = experts.ExpertSum(name, part, ranks, asked)
        if forward is not None:
            part.forward = forward
