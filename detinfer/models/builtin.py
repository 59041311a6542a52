"""``builtin:dense`` and ``builtin:moe``: small models that need no download and run on any number of ranks up to 8.

Both have two layers, the second of ``moe`` a mixture of experts. Sizes are odd on purpose, and the weights are made so
that the order of a sum over ranks shows (detinfer/models/weights.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from detinfer.errors import TargetError
from detinfer.models.decoder import Attention, Decoder, Dense, Layer
from detinfer.models.layer_communicator import LayerCommunicator, LayerModes, modes_of
from detinfer.models.moe import Experts, MoE
from detinfer.models.parallel import AllReduce, ColumnParallel, Head, Product, RowParallel, share
from detinfer.models.ranks import Ranks
from detinfer.models.weights import MOST_RANKS, cancelling, draw, large, repeating
from detinfer.policy.policy import Reductions

NAMES = ("dense", "moe")
HIDDEN, HEADS, KV_HEADS, WIDTH = 60, 8, 4, 10
INNER, VOCABULARY, POSITIONS, EPSILON = 77, 101, 256, 1e-5
EXPERTS, CHOSEN, EXPERT_INNER, SHARED_INNER = 6, 3, 37, 45


@dataclass(frozen=True)
class Communication:
    """How the layers' parts are added over ranks.

    ``reductions``, the policy's, changes bits: a mixture of experts adds the experts' and the shared expert's parts in one
    sum or in two. The others do not: with ``communicator`` sums are put off to where ``models.layer_communicator`` makes
    them, with ``allow_reduce_scatter`` also row by row.
    """

    reductions: Reductions = "merged"
    communicator: bool = False
    allow_reduce_scatter: bool = False


DEFAULT = Communication()


def build(name: str, dtype: torch.dtype, seed: int, ranks: Ranks, communication: Communication = DEFAULT) -> Decoder:
    """This rank's share of a model; TargetError for another name or more ranks than the model can be cut into."""
    if name not in NAMES:
        raise TargetError(f"target builtin:{name}: the built-in models are {', '.join(NAMES)}")
    if ranks.size > MOST_RANKS:
        raise TargetError(f"target builtin:{name}: {ranks.size} ranks; it can be cut into {MOST_RANKS} at most")
    return layers(("dense", name), dtype, seed, ranks, communication)


def layers(
    kinds: Sequence[str], dtype: torch.dtype, seed: int, ranks: Ranks, communication: Communication = DEFAULT
) -> Decoder:
    """This rank's share of a model of as many layers as ``kinds``, each ``dense`` or ``moe``."""
    if communication.communicator and communication.reductions == "separate":
        raise TargetError("separate reductions are the layers' own: a layer communicator has merged ones alone")
    return _Builder(dtype, seed, ranks, communication).decoder(tuple(kinds))


class _Builder:
    def __init__(self, dtype: torch.dtype, seed: int, ranks: Ranks, communication: Communication) -> None:
        self._dtype, self._seed, self._ranks = dtype, seed, ranks
        self._communication, self._reduce_results = communication, not communication.communicator

    def decoder(self, kinds: tuple[str, ...]) -> Decoder:
        """One layer of each kind."""
        table = (self._draw("embedding", VOCABULARY, HIDDEN) * 4).to(self._dtype)
        embedding = nn.Embedding(VOCABULARY, HIDDEN, _weight=table)
        modes = modes_of([kind == "moe" for kind in kinds], self._communication.allow_reduce_scatter)
        layers = [self._layer(index, kind, mode) for index, (kind, mode) in enumerate(zip(kinds, modes, strict=True))]
        head = Head(self._draw("head", VOCABULARY, HIDDEN), self._ranks, self._dtype)
        return Decoder(embedding, layers, self._norm("norm"), head, POSITIONS, WIDTH)

    def _draw(self, name: str, *shape: int) -> torch.Tensor:
        return draw(self._seed, name, *shape)

    def _norm(self, name: str) -> nn.RMSNorm:
        norm = nn.RMSNorm(HIDDEN, eps=EPSILON, dtype=self._dtype)
        norm.weight = nn.Parameter((1 + self._draw(name, HIDDEN)).to(self._dtype), requires_grad=False)
        return norm

    def _reduce(self, name: str) -> AllReduce:
        return AllReduce(self._ranks, f"{name}.all_reduce")

    def _layer(self, index: int, kind: str, modes: LayerModes) -> Layer:
        name = f"layers.{index}"
        norms = self._norm(f"{name}.attention_norm"), self._norm(f"{name}.feed_forward_norm")
        feed_forward = (self._moe if kind == "moe" else self._dense)(f"{name}.feed_forward")
        between = None if self._reduce_results else LayerCommunicator(name, self._ranks, modes)
        return Layer(self._attention(f"{name}.self_attn", index), feed_forward, norms, between)

    def _attention(self, name: str, index: int) -> Attention:
        # The middle and the last query head repeat the first, and so do their KV heads: what they add cancels.
        heads = share(HEADS, self._ranks)
        per_group = HEADS // KV_HEADS
        groups = [head // per_group for head in range(heads.start, heads.stop)]
        mine = slice(heads.start * WIDTH, heads.stop * WIDTH)
        held = slice(groups[0] * WIDTH, (groups[-1] + 1) * WIDTH)
        same = [place.start for place in large(HEADS)]
        q = repeating(self._draw(f"{name}.q", HEADS * WIDTH, HIDDEN), _rows(same))
        k, v = (
            repeating(
                self._draw(f"{name}.{part}", KV_HEADS * WIDTH, HIDDEN), _rows([head // per_group for head in same])
            )
            for part in ("k", "v")
        )
        o = cancelling(self._draw(f"{name}.o", HIDDEN, HEADS * WIDTH), _rows(same))
        projections = (
            ColumnParallel(q, mine, self._dtype),
            ColumnParallel(k, held, self._dtype),
            ColumnParallel(v, held, self._dtype),
            RowParallel(o, mine, self._dtype),
        )
        own = [group - groups[0] for group in groups]
        return Attention(index, WIDTH, own, projections, self._reduce(name), self._reduce_results)

    def _gated(self, name: str, inner: int, *experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whole weights of gate, up and down, whose first and last inner columns cancel."""
        places = large(inner)
        gate, up = (repeating(self._draw(f"{name}.{part}", *experts, inner, HIDDEN), places) for part in ("gate", "up"))
        return gate, up, cancelling(self._draw(f"{name}.down", *experts, HIDDEN, inner), places)

    def _dense(self, name: str) -> Dense:
        mine = share(INNER, self._ranks)
        gate, up, down = self._gated(name, INNER)
        return Dense(
            ColumnParallel(gate, mine, self._dtype),
            ColumnParallel(up, mine, self._dtype),
            RowParallel(down, mine, self._dtype),
            self._reduce(name),
            self._reduce_results,
        )

    def _moe(self, name: str) -> MoE:
        mine, shared = share(EXPERT_INNER, self._ranks), share(SHARED_INNER, self._ranks)
        gate, up, down = self._gated(f"{name}.experts", EXPERT_INNER, EXPERTS)
        experts = Experts(*(part.to(self._dtype) for part in (gate[:, mine], up[:, mine], down[..., mine])))
        gate, up, down = self._gated(f"{name}.shared", SHARED_INNER)
        separate = self._communication.reductions == "separate"
        return MoE(
            Product((self._draw(f"{name}.router", EXPERTS, HIDDEN) * 4).to(self._dtype)),
            CHOSEN,
            experts,
            (
                ColumnParallel(gate, shared, self._dtype),
                ColumnParallel(up, shared, self._dtype),
                RowParallel(down, shared, self._dtype, unrounded=True),
            ),
            self._reduce(name),
            AllReduce(self._ranks, f"{name}.shared_all_reduce") if separate else None,
            self._reduce_results,
        )


def _rows(heads: list[int]) -> tuple[slice, ...]:
    """The rows of a projection that belong to each of ``heads``."""
    return tuple(slice(head * WIDTH, (head + 1) * WIDTH) for head in heads)
