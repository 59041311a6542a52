"""Mixture of experts: which experts a token takes, and how their outputs are joined.

For one token, whatever stands beside it in the batch and however many tokens an expert gets::

    chosen_0, chosen_1, ... = the experts of the greatest scores, descending, equal ones by the lower index
    e_r = down(gate(up(x))) of expert chosen_r: products in the order of ``linear``; up's is rounded to the dtype,
          down's stays fp32, bias and all
    acc = w_0 * e_0;  acc = acc + (w_r * e_r) for r = 1, 2, ...: a multiplication, then an addition, in fp32
    out = acc, plus the shared expert's unrounded output if there is one, rounded once to the dtype

``topk`` is an operation of torch that this family covers. ``experts`` is made of covered operations and gives these bits
under a policy; on a GPU, in bf16 and fp16, it runs the kernels of ``moe_cuda``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from detinfer import native
from detinfer.ops.evidence import WIDTHS, Evidence, every_exponent, from_values, to_values
from detinfer.reference import moe as reference

PATH = "torch, stable sort"
"""Where the covered operation runs: a choice has no order of sums, and torch's stable sort leaves ties in place."""


def topk(self: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """aten::topk: (values, indices) of the ``k`` greatest or least along ``dim``, in order, equal ones by lower index.

    NaN counts as greater than any number and the zeros as equal, as in torch's sort. ``sorted`` False gives the same.
    Raises what torch raises for a ``k`` out of range.
    """
    if not self.dim() or k > self.shape[dim] or k < 0:
        return NotImplemented  # torch's own kernel has the sentence for it, and a scalar has one value
    indices = torch.sort(self, dim=dim, descending=largest, stable=True)[1].narrow(dim, 0, k).contiguous()
    return take(self, dim, indices), indices


def take(x: torch.Tensor, dim: int, indices: torch.Tensor) -> torch.Tensor:
    """``x.gather(dim, indices)`` byte for byte: torch's own gather and sort on CPU change the bytes of a 16-bit NaN."""
    as_integers = {2: torch.int16, 4: torch.int32}.get(x.element_size()) if x.is_floating_point() else None
    return x.gather(dim, indices) if as_integers is None else x.view(as_integers).gather(dim, indices).view(x.dtype)


@dataclass(frozen=True)
class Experts:
    """The weights of all experts of a layer.

    ``up`` is [experts, inner, hidden] and ``down`` [experts, hidden, width], or both with their last two dimensions
    swapped if ``transposed``; biases are [experts, inner] and [experts, hidden]. ``gate`` makes [n, width] of [n, inner].
    """

    up: torch.Tensor
    down: torch.Tensor
    gate: Callable[[torch.Tensor], torch.Tensor]
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    transposed: bool = False

    def product(self, kind: str, expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight [out, in] and the bias of one expert's ``up`` or ``down``."""
        weight, bias = (self.up, self.up_bias) if kind == "up" else (self.down, self.down_bias)
        one = weight[expert].t() if self.transposed else weight[expert]
        return one, None if bias is None else bias[expert]


def unrounded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """linear in fp32 [..., out]: the dtype's own chain without the last rounding (on CPU because widening is exact)."""
    if on_matrix_unit(x):
        from detinfer.ops import moe_cuda

        rows = x.flatten(0, -2)
        found = moe_cuda.product(rows, weight[None], None if bias is None else bias[None], unrounded=True)
        return found.view(*x.shape[:-1], -1)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def on_matrix_unit(x: torch.Tensor) -> bool:
    """Whether experts run on the kernels of ``moe_cuda``: bf16 and fp16 on a GPU."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def outputs(x: torch.Tensor, chosen: torch.Tensor, layer: Experts) -> torch.Tensor:
    """x [tokens, hidden] and chosen [tokens, k] to the chosen experts' outputs, fp32 [tokens, k, hidden]."""
    found = torch.empty((*chosen.shape, x.shape[1]), dtype=torch.float32, device=x.device)
    for expert in sorted(set(chosen.flatten().tolist())):
        token, place = torch.nonzero(chosen == expert, as_tuple=True)
        up, up_bias = layer.product("up", expert)
        down, down_bias = layer.product("down", expert)
        found[token, place] = unrounded(layer.gate(F.linear(x[token], up, up_bias)), down, down_bias)
    return found


def combine(
    weights: torch.Tensor, found: torch.Tensor, dtype: torch.dtype, shared: torch.Tensor | None = None
) -> torch.Tensor:
    """weights [tokens, k], fp32 outputs [tokens, k, hidden] and fp32 shared [tokens, hidden] to [tokens, hidden]."""
    share = weights.float()[..., None]
    acc = share[:, 0] * found[:, 0]
    for place in range(1, found.shape[1]):
        acc = acc + share[:, place] * found[:, place]
    return (acc if shared is None else acc + shared).to(dtype)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    layer: Experts,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer on x [tokens, hidden], with chosen and weights [tokens, k] and shared fp32 [tokens, hidden] or None.

    Experts outside of 0 .. experts - 1 raise an IndexError. Returns [tokens, hidden] of the dtype of ``x``.
    """
    if on_matrix_unit(x):
        from detinfer.ops import moe_cuda

        return moe_cuda.experts(x, chosen, weights, layer, shared)
    return combine(weights, outputs(x, chosen, layer), x.dtype, shared)


COVERED: dict[str, Callable[..., Any]] = {"aten::topk": topk}
"""Operations that this family computes, each with its function."""

REDUCES: frozenset[str] = frozenset()
"""None of them contains a sum."""


def choices(dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, int, bool, int, torch.Tensor]]:
    """Rows [5, n] with ties, zeros of both signs, NaN and infinities; k, largest, the dimension to lay them along, and the
    reference's indices [5, k]."""
    for n in (2, *WIDTHS[1:5]):
        random = np.random.default_rng(n)
        few = random.integers(-2, 3, (5, n)).astype(np.float32)
        few[few == 0] *= np.where(random.integers(0, 2, np.count_nonzero(few == 0)) == 0, 1, -1)
        few[3:][random.integers(0, 5, (2, n)) == 0] = np.nan
        few[4, :: max(n // 3, 1)] = np.inf
        x = from_values(few, dtype)
        x[1] = every_exponent(dtype)[random.integers(0, 3000, n)]
        for k in (1, 2, min(n, 9)):
            for largest in (True, False):
                index = torch.from_numpy(reference.top_k(to_values(x), k, largest))
                yield from ((x, k, largest, dim, index) for dim in (1, 0))


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare ``topk`` with the reference on ``choices``; (results compared, their bytes), or Diverged."""
    native.dtype_code(dtype, op)
    evidence = Evidence(op, dtype)
    for x, k, largest, dim, index in choices(dtype):
        values, indices = COVERED[op](x if dim else x.t().contiguous(), k, dim, largest)
        where = f"{k} of {x.shape[1]}, {'greatest' if largest else 'least'}, dimension {dim}"
        evidence.expect(indices if dim else indices.t().contiguous(), index, f"{where}, indices")
        evidence.expect(values if dim else values.t().contiguous(), take(x, 1, index), f"{where}, values")
    return evidence.total()
