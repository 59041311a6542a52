"""Arguments become JSON and come back with the same bytes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from detinfer import bits
from detinfer.goldens import tree
from detinfer.models.cache import KVCache


def test_every_kind_of_value_comes_back() -> None:
    """Scalars, dtypes, nested containers and tensors survive the way through JSON."""
    tensor = torch.tensor([[1.5, -0.0]])
    value = (
        (tensor, 3, True, None, "text"),
        {"a": [0.1, math.inf, -0.0], "t": torch.bfloat16, "d": torch.device("cpu")},
    )
    node = tree.encode(value)
    held: dict[str, torch.Tensor] = {}

    def put(path: str, leaf: torch.Tensor) -> str:
        held[path] = leaf
        return path

    text = json.dumps(tree.map_tensors(node, put))
    back = tree.decode(tree.map_tensors(json.loads(text), lambda _, key: held[key]))
    assert bits.as_bytes(back[0][0]) == bits.as_bytes(tensor)
    assert back[0][1:] == (3, True, None, "text")
    assert isinstance(back[0], tuple) and isinstance(back[1]["a"], list)
    assert back[1]["t"] is torch.bfloat16 and back[1]["d"] == torch.device("cpu")
    assert back[1]["a"][:2] == [0.1, math.inf] and math.copysign(1, back[1]["a"][2]) == -1


def test_a_cache_keeps_the_layers_asked_for_and_is_filled_apart_from_the_record() -> None:
    """A built-in model's KV cache, one layer of it: a call on the copy leaves the recorded tensors as they are."""
    cache = KVCache()
    for index in (0, 3):
        cache.update(index, torch.full((1, 2, 3, 4), float(index)), torch.full((1, 2, 3, 4), -float(index)))
    node = tree.encode({"cache": cache}, frozenset({3}))
    assert [path for path, _ in tree.tensors(node)] == ["cache.3.keys", "cache.3.values"]
    back = tree.decode(tree.map_tensors(node, lambda _, tensor: tensor))["cache"]
    assert isinstance(back, KVCache) and back.length == 3
    assert list(tree.caches([back])) == [back]
    back.update(3, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert (back.length, cache.length) == (4, 3)
    assert bits.as_bytes(back.layers[3][0][:, :, :3]) == bits.as_bytes(cache.layers[3][0])
    assert [path for path, _ in tree.tensors(tree.encode(KVCache()))] == []


def test_bool_stays_bool() -> None:
    """True is not 1: torch overloads differ by it."""
    assert tree.decode(json.loads(json.dumps(tree.encode(True)))) is True


def test_an_object_is_refused_with_its_path() -> None:
    """What has no JSON form is named, so that the unit can be reported as skipped."""
    with pytest.raises(tree.NotEncodable, match=r"1\.x: builtins\.object"):
        tree.encode(((), {"x": object()}))


def test_cache_keeps_only_the_units_own_layers() -> None:
    """Of a KV cache, a block sees its own layer; the copy that comes back grows without touching the recording."""
    pytest.importorskip("transformers")
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.full((1, 2, 4, 8), float(layer)), torch.full((1, 2, 4, 8), -float(layer)), layer)
    node = tree.encode({"past": cache}, frozenset({1}))
    assert [path for path, _ in tree.tensors(node)] == ["past.1.keys", "past.1.values"]
    again = tree.decode(node)["past"]
    again.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 1)
    assert again.layers[1].keys.shape[2] == 5
    assert dict(tree.tensors(node))["past.1.keys"].shape[2] == 4


def test_a_sliding_cache_comes_back_as_one() -> None:
    """Before its first call and after more positions than its window: what it returns and keeps is the same."""
    pytest.importorskip("transformers")
    from transformers import DynamicCache, LlamaConfig

    config = LlamaConfig(num_hidden_layers=3, sliding_window=4)
    config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]

    def pieces() -> DynamicCache:
        return DynamicCache(config=config)

    def step(cache: DynamicCache, length: int, start: int) -> bytes:
        keys = torch.arange(start, start + length).float()[None, None, :, None].expand(1, 2, length, 3)
        return b"".join(bits.as_bytes(t.contiguous()) for t in cache.update(keys, -keys, 1))

    for lengths in ([], [3], [7], [2, 6, 1]):
        cache = pieces()
        for i, length in enumerate(lengths):
            step(cache, length, 10 * i)
        node = tree.encode({"past": cache}, frozenset({1}))
        held = dict(tree.tensors(node))
        text = json.dumps(tree.map_tensors(node, lambda path, _: path))
        back = tree.decode(tree.map_tensors(json.loads(text), lambda _, path, held=held: held[path]))["past"]
        assert back.layers[1].get_mask_sizes(1) == cache.layers[1].get_mask_sizes(1)
        assert step(back, 2, 90) == step(cache, 2, 90)
        assert back.layers[1].keys.shape == cache.layers[1].keys.shape
        assert back.get_seq_length(1) == cache.get_seq_length(1) == sum(lengths) + 2
