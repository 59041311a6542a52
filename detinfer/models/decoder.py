"""A small decoder in the llama manner: grouped-query attention, rotary positions, RMSNorm, dense and MoE layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from detinfer.errors import TargetError
from detinfer.models import rope
from detinfer.models.cache import KVCache
from detinfer.models.layer_communicator import LayerCommunicator, Stream, modes_of
from detinfer.models.parallel import AllReduce, ColumnParallel, Head, RowParallel
from detinfer.models.partial import PartialSum


class Attention(nn.Module):
    """Causal grouped-query attention over this rank's query heads; ``groups`` names the KV head of each of them."""

    groups: torch.Tensor

    def __init__(
        self,
        layer_idx: int,
        width: int,
        groups: list[int],
        projections: tuple[ColumnParallel, ColumnParallel, ColumnParallel, RowParallel],
        all_reduce: AllReduce,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        self.layer_idx, self.width = layer_idx, width
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections
        self.all_reduce, self.reduce_results = all_reduce, reduce_results
        self.register_buffer("groups", torch.tensor(groups), persistent=False)

    def extra_repr(self) -> str:
        return f"{len(self.groups)} heads of width {self.width}"

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache
    ) -> torch.Tensor | PartialSum:
        q, k, v = (part(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for part in self._in())
        k, v = cache.update(self.layer_idx, rope.rotate(k, cos, sin), v)
        queries, keys = q.shape[2], k.shape[2]
        mask = None
        if 1 < queries < keys:  # a prompt in pieces: row i sees what was there before and the first i + 1 of its own
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        # A rank's share of the query heads may cut a group: each head names its KV head.
        out = F.scaled_dot_product_attention(
            rope.rotate(q, cos, sin), k[:, self.groups], v[:, self.groups], attn_mask=mask, is_causal=queries == keys
        )
        return self.all_reduce.results(self.o_proj(out.transpose(1, 2).flatten(2)), self.reduce_results)

    def _in(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.q_proj, self.k_proj, self.v_proj


class Dense(nn.Module):
    """A gated feed-forward layer: [B, S, hidden] to the same, summed over ranks."""

    def __init__(
        self,
        gate: ColumnParallel,
        up: ColumnParallel,
        down: RowParallel,
        all_reduce: AllReduce,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.activation = nn.SiLU()
        self.all_reduce, self.reduce_results = all_reduce, reduce_results

    def forward(self, x: torch.Tensor) -> torch.Tensor | PartialSum:
        out: torch.Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.all_reduce.results(out, self.reduce_results)


class Layer(nn.Module):
    """RMSNorm and attention, RMSNorm and feed-forward, each added to the residual.

    With a ``communicator`` it takes and gives a Stream, and its attention and feed-forward give parts of sums.
    """

    def __init__(
        self,
        attention: Attention,
        feed_forward: nn.Module,
        norms: tuple[nn.RMSNorm, nn.RMSNorm],
        communicator: LayerCommunicator | None = None,
    ) -> None:
        super().__init__()
        self.communicator = communicator
        self.attention_norm, self.feed_forward_norm = norms
        self.self_attn, self.feed_forward = attention, feed_forward

    def forward(self, x: Any, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache) -> Any:
        if self.communicator is not None:
            return self._communicated(self.communicator, x, cos, sin, cache)
        x = x + self.self_attn(self.attention_norm(x), cos, sin, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def _communicated(
        self, between: LayerCommunicator, x: Stream | torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache
    ) -> Stream:
        hidden, stream = between.prepare_attention(x, self.attention_norm)
        hidden, stream = between.prepare_feed_forward(
            self.self_attn(hidden, cos, sin, cache), stream, self.feed_forward_norm
        )
        return between.finish(self.feed_forward(hidden), stream)


@contextmanager
def communicated(decoder: Decoder) -> Iterator[None]:
    """Inside the block the layers leave their sums over ranks to layer communicators: fused with the norm where that can be.

    Not for layers that were built so, nor with separate reductions, which cannot be put off.
    """
    layers = [layer for layer in decoder.layers if isinstance(layer, Layer)]
    sparse = [hasattr(layer.feed_forward, "experts") for layer in layers]
    parts: list[Any] = [part for layer in layers for part in (layer.self_attn, layer.feed_forward)]
    try:
        for number, (layer, modes) in enumerate(zip(layers, modes_of(sparse, False), strict=True)):
            layer.communicator = LayerCommunicator(f"layers.{number}", layer.self_attn.all_reduce.ranks, modes)
        for part in parts:
            part.reduce_results = False
        yield
    finally:
        for layer in layers:
            layer.communicator = None
        for part in parts:
            part.reduce_results = True


def communicates(decoder: Decoder) -> bool:
    """Whether ``communicated`` is for a model: its layers make their sums themselves, merged."""
    return all(
        isinstance(layer, Layer)
        and layer.communicator is None
        and getattr(layer.feed_forward, "shared_all_reduce", None) is None
        for layer in decoder.layers
    )


class Output(NamedTuple):
    """Logits [B, S, vocabulary] and the cache, which now holds these S positions as well."""

    logits: torch.Tensor
    past_key_values: KVCache


class Decoder(nn.Module):
    """Token ids [B, S] to logits; every row of a batch is at the same position."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self, embedding: nn.Embedding, layers: list[Layer], norm: nn.RMSNorm, head: Head, positions: int, width: int
    ) -> None:
        super().__init__()
        self.embedding, self.layers, self.norm, self.head = embedding, nn.ModuleList(layers), norm, head
        for name, table in zip(("cos", "sin"), rope.tables(positions, width), strict=True):
            self.register_buffer(name, table, persistent=False)  # fp32 in every dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding: its rows are the vocabulary."""
        return self.embedding

    def forward(
        self, input_ids: torch.Tensor, past_key_values: KVCache | None = None, use_cache: bool = True
    ) -> Output:
        """One step: a prompt, a piece of it or one token a row. Raises TargetError past the last position."""
        cache = KVCache() if past_key_values is None else past_key_values
        start, end = cache.length, cache.length + input_ids.shape[1]
        if end > len(self.cos):
            raise TargetError(f"position {end}: the built-in models have {len(self.cos)}; give shorter prompts")
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, self.cos[start:end], self.sin[start:end], cache)
        if isinstance(x, Stream):
            x = x.whole()
        return Output(self.head(self.norm(x)), cache)
