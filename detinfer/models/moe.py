"""A mixture-of-experts layer whose bits do not depend on how many tokens an expert got.

Every expert is spread over all ranks by its inner columns, so a rank joins its parts of the experts' outputs, and of
the shared expert's, in fp32 and in one order (detinfer/reference/moe.py), rounds once, and the ranks' sums are added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from detinfer.errors import UsageError
from detinfer.models.parallel import AllReduce, Product, RowParallel
from detinfer.models.partial import PartialSum


class TopK(nn.Module):
    """Router logits [..., experts] to weights, fp32 [..., k], and experts, int64 [..., k], in descending order.

    Ties go to the lower index. Weights are the softmax of the chosen logits alone. Logits must be finite.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def extra_repr(self) -> str:
        return f"k={self.k}"

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, found = logits, []
        for _ in range(self.k):  # argmax gives the first of equal ones; topk promises nothing
            found.append(left.argmax(-1, keepdim=True))
            left = left.scatter(-1, found[-1], float("-inf"))
        experts = torch.cat(found, -1)
        return torch.softmax(logits.gather(-1, experts).float(), -1), experts


class Experts(nn.Module):
    """The chosen experts' outputs, joined: unrounded in fp32 until the one rounding at the end.

    Weights: ``gate`` and ``up`` [experts, inner, hidden], ``down`` [experts, hidden, inner].
    """

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(gate.contiguous(), requires_grad=False)
        self.up = nn.Parameter(up.contiguous(), requires_grad=False)
        self.down = nn.Parameter(down.contiguous(), requires_grad=False)

    def extra_repr(self) -> str:
        experts, inner, hidden = self.gate.shape
        return f"{experts} experts, {hidden} -> {inner} -> {hidden}"

    def forward(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, shared: torch.Tensor | None
    ) -> torch.Tensor:
        """[B, S, hidden], [B, S, k], [B, S, k], fp32 [B, S, hidden] to [B, S, hidden] of the dtype of ``x``.

        Without ``shared``, which then has a sum over ranks of its own, the experts' outputs alone.
        """
        tokens, k = x.flatten(0, -2), weights.shape[-1]
        chosen = experts.flatten(0, -2)
        outputs = torch.empty((k, *tokens.shape), dtype=torch.float32, device=x.device)
        for expert in range(len(self.gate)):
            token, place = torch.nonzero(chosen == expert, as_tuple=True)
            if len(token):
                outputs[place, token] = self._expert(expert, tokens[token])
        share = weights.flatten(0, -2)[..., None]
        acc = share[:, 0] * outputs[0]
        for rank in range(1, k):
            acc = acc + share[:, rank] * outputs[rank]
        if shared is not None:
            acc = acc + shared.flatten(0, -2)
        return acc.to(x.dtype).view(x.shape)

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        inner = F.silu(F.linear(x, self.gate[expert])) * F.linear(x, self.up[expert])
        return F.linear(inner.float(), self.down[expert].float())


class MoE(nn.Module):
    """Router, experts and a shared expert that every token takes: [B, S, hidden] to the same, summed over ranks.

    Merged, the shared expert's part joins the experts' before the one sum over ranks; where it is given an
    ``all_reduce`` of its own (``shared_all_reduce``) the sums are separate, and rounded one by one. Without
    ``reduce_results`` the merged part is returned, for a layer communicator to add.
    """

    def __init__(
        self,
        router: Product,
        k: int,
        experts: Experts,
        shared: tuple[Product, Product, RowParallel],
        all_reduce: AllReduce,
        shared_all_reduce: AllReduce | None = None,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        if shared_all_reduce is not None and not reduce_results:
            raise UsageError(f"{all_reduce.layer}: separate reductions are the layer's own: they cannot be put off")
        self.router, self.top_k, self.experts = router, TopK(k), experts
        self.shared_gate, self.shared_up, self.shared_down = shared
        self.activation = nn.SiLU()
        self.all_reduce, self.reduce_results = all_reduce, reduce_results
        self.shared_all_reduce = shared_all_reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor | PartialSum:
        weights, experts = self.top_k(self.router(x))
        shared = self.shared_down(self.activation(self.shared_gate(x)) * self.shared_up(x))
        if self.shared_all_reduce is not None:
            alone: torch.Tensor = self.all_reduce(self.experts(x, weights, experts, None))
            both: torch.Tensor = alone + self.shared_all_reduce(shared.to(x.dtype))
            return both
        return self.all_reduce.results(self.experts(x, weights, experts, shared), self.reduce_results)
