"""Where a decoder layer's sums over ranks are made: at once, in the next norm, or row by row.

Attention and feed-forward layers built with ``reduce_results=False`` give a ``PartialSum``; the communicator of their layer
adds it over ranks, adds the residual, and normalises. Three ways, one for each neighbourhood, of the same bytes:

full       all_reduce, and every rank holds all rows
carried    the part goes into the next layer's norm: one fused all_reduce + add + RMSNorm where the ranks have it
scattered  reduce_scatter: each rank adds and normalises its own rows, then they are gathered

A sum over ranks belongs to an element and a norm to a row, so which rank computes it does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from detinfer.models.partial import PartialSum, part
from detinfer.models.ranks import Ranks

ScatterMode = Literal["full", "carried", "scattered"]


@dataclass(frozen=True)
class LayerModes:
    """How a layer's hidden state arrives (``input``) and leaves (``output``)."""

    input: ScatterMode
    output: ScatterMode


def layer_modes(
    sparse: bool,
    previous_sparse: bool,
    next_sparse: bool,
    *,
    first: bool,
    is_last_layer: bool,
    allow_reduce_scatter: bool,
) -> LayerModes:
    """The modes of a layer that is ``sparse`` (a mixture of experts) or dense, between its neighbours.

    Between two sparse layers rows are scattered, where that is allowed; otherwise the sum is carried into the next norm.
    The last layer has no next norm of its own kind: it reduces at once. A layer's output is its successor's input.
    """
    scatter_before = allow_reduce_scatter and previous_sparse and sparse
    scatter_after = allow_reduce_scatter and sparse and next_sparse
    arrives: ScatterMode = "full" if first else "scattered" if scatter_before else "carried"
    leaves: ScatterMode = "full" if is_last_layer else "scattered" if scatter_after else "carried"
    return LayerModes(arrives, leaves)


def modes_of(sparse: Sequence[bool], allow_reduce_scatter: bool) -> list[LayerModes]:
    """The modes of a whole model, given which of its layers are sparse."""
    last = len(sparse) - 1
    return [
        layer_modes(
            sparse[index],
            index > 0 and sparse[index - 1],
            index < last and sparse[index + 1],
            first=index == 0,
            is_last_layer=index == last,
            allow_reduce_scatter=allow_reduce_scatter,
        )
        for index in range(len(sparse))
    ]


@dataclass(frozen=True)
class Stream:
    """What goes from layer to layer: the residual, and what is still to be added to it.

    ``residual`` is [B, S, hidden], or with ``rows`` this rank's rows of it, [rows, hidden]. ``hidden`` is a rank's part
    (carried), this rank's rows of the sum (scattered), or None where the residual has it.
    """

    residual: torch.Tensor
    shape: torch.Size
    ranks: Ranks
    hidden: PartialSum | torch.Tensor | None = None
    rows: bool = False

    def whole(self) -> torch.Tensor:
        """The residual of all rows on every rank, [B, S, hidden], with nothing left to add."""
        if isinstance(self.hidden, PartialSum):
            self.hidden._misused("the end of the model")
        residual = self.residual if self.hidden is None else self.residual + self.hidden
        return self.ranks.gather_rows(residual).view(self.shape) if self.rows else residual


class LayerCommunicator:
    """One layer's sums over ranks. Raises DoubleReduceError for an output that is summed already, naming its layer."""

    def __init__(self, name: str, ranks: Ranks, modes: LayerModes) -> None:
        self.name, self.modes = name, modes
        self._ranks = ranks

    def prepare_attention(self, x: Stream | torch.Tensor, norm: nn.RMSNorm) -> tuple[torch.Tensor, Stream]:
        """(the attention's input, all rows of it; the stream): the sum that the layer before left is made here."""
        if isinstance(x, torch.Tensor):
            return norm(x), Stream(x, x.shape, self._ranks)
        if isinstance(x.hidden, PartialSum):
            return self._join(x.hidden, x, norm, f"{self.name}.attention_norm")
        residual = x.residual if x.hidden is None else x.residual + x.hidden
        stream = Stream(residual, x.shape, self._ranks, rows=x.rows)
        hidden = norm(residual)
        return (self._ranks.gather_rows(hidden).view(x.shape) if x.rows else hidden), stream

    def prepare_feed_forward(
        self, attention: PartialSum | torch.Tensor, stream: Stream, norm: nn.RMSNorm
    ) -> tuple[torch.Tensor, Stream]:
        """(the feed-forward layer's input; the stream) of the attention's part."""
        if not isinstance(attention, PartialSum):
            part(attention, f"{self.name}.self_attn", f"{self.name}'s communicator")
        return self._join(attention, stream, norm, f"{self.name}.feed_forward_norm")  # type: ignore[arg-type]

    def finish(self, out: PartialSum | torch.Tensor, stream: Stream) -> Stream:
        """The stream after the feed-forward layer, as the next layer is to find it."""
        by = f"{self.name}'s communicator"
        if not isinstance(out, PartialSum):
            part(out, f"{self.name}.feed_forward", by)
        assert isinstance(out, PartialSum)
        if self.modes.output == "carried" and self._ranks.size > 1:
            return Stream(self._full(stream), stream.shape, self._ranks, hidden=out)
        if self.modes.output == "scattered" and self._divides(stream.shape):
            mine = self._ranks.reduce_scatter_rows(part(out, out.layer, by).flatten(0, -2), out.layer)
            return Stream(self._own_rows(stream), stream.shape, self._ranks, hidden=mine, rows=True)
        total = self._ranks.all_reduce(part(out, out.layer, by), f"{out.layer}.all_reduce")
        return Stream(self._full(stream) + total, stream.shape, self._ranks)

    def _join(self, hidden: PartialSum, stream: Stream, norm: nn.RMSNorm, by: str) -> tuple[torch.Tensor, Stream]:
        """all_reduce, add the residual, normalise: in one call where the ranks have it."""
        residual, own = self._full(stream), part(hidden, hidden.layer, by)
        if self._ranks.fused:
            assert norm.eps is not None
            out, total = self._ranks.all_reduce_rms_norm(own, residual, norm.weight, norm.eps)
        else:
            total = residual + self._ranks.all_reduce(own, f"{hidden.layer}.all_reduce")
            out = norm(total)
        return out, Stream(total, stream.shape, self._ranks)

    def _full(self, stream: Stream) -> torch.Tensor:
        return self._ranks.gather_rows(stream.residual).view(stream.shape) if stream.rows else stream.residual

    def _own_rows(self, stream: Stream) -> torch.Tensor:
        if stream.rows:
            return stream.residual
        rows = stream.residual.flatten(0, -2)
        count = len(rows) // self._ranks.size
        return rows[self._ranks.rank * count : (self._ranks.rank + 1) * count]

    def _divides(self, shape: torch.Size) -> bool:
        """Whether the ranks can share out the rows evenly; otherwise each holds them all, with the same bytes."""
        return self._ranks.size > 1 and (shape.numel() // shape[-1]) % self._ranks.size == 0
