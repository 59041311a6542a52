"""Arguments and outputs of a layer as plain JSON values with tensors at the leaves: no pickle anywhere.

A *node* is one of::

    {"tensor": T}            T is a Tensor in memory and its digest in a manifest
    {"value": v}             None, bool, int or str
    {"float": "0x1.8p+1"}    a float, exactly
    {"dtype": "bfloat16"}    {"device": "cpu"}
    {"list": [...]}          {"tuple": [...]}          {"dict": {name: node}}
    {"cache": {"3": {"keys": node, "values": node}}}   the layers of a transformers KV cache; of a sliding one also
                                                       "window" and "seen", and no keys before its first call
    {"kv": {"3": {"keys": node, "values": node}}}      the layers of a built-in model's KV cache

A tensor's *path* is the names on the way to it, joined by dots, e.g. ``keywords.past_key_values.3.keys``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from detinfer.models.cache import KVCache

Node = dict[str, Any]
Leaf = Callable[[str, Any], Any]
"""Called with a tensor's path and the tensor (or whatever stands for it); returns what takes its place."""


class NotEncodable(Exception):
    """A value that has no JSON form; the message is the path and the type."""


_SLIDING = "DynamicSlidingWindowLayer"


def _is_cache(value: object) -> bool:
    return isinstance(value, KVCache) or _is_transformers(value)


def _is_transformers(value: object) -> bool:
    # Asked by shape, so that nothing here needs transformers: its caches hold a list of layers with keys and values.
    return type(value).__module__.startswith("transformers.cache_utils") and hasattr(value, "layers")


def encode(value: Any, layers: frozenset[int] | None = None, path: str = "") -> Node:
    """The node of ``value``; of a KV cache only the layers in ``layers`` (all when None). Tensors are not copied."""
    if isinstance(value, torch.Tensor):
        return {"tensor": value.detach()}
    if value is None or isinstance(value, bool | int | str):
        return {"value": value}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [encode(item, layers, _join(path, i)) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise NotEncodable(f"{path or 'argument'}: a dict with keys that are no strings")
        return {"dict": {name: encode(item, layers, _join(path, name)) for name, item in value.items()}}
    if isinstance(value, KVCache):
        own = {index: pair for index, pair in value.layers.items() if layers is None or index in layers}
        return {"kv": {str(i): {"keys": {"tensor": k}, "values": {"tensor": v}} for i, (k, v) in own.items()}}
    if _is_transformers(value):
        held: Node = {}
        for index, layer in enumerate(value.layers):
            if layers is not None and index not in layers:
                continue
            parts: Node = {}
            if getattr(layer, "keys", None) is not None:
                parts = {"keys": {"tensor": layer.keys}, "values": {"tensor": layer.values}}
            if type(layer).__name__ == _SLIDING:
                parts |= {"window": {"value": layer.sliding_window}, "seen": {"value": layer.cumulative_length}}
            if parts:
                held[str(index)] = parts
        return {"cache": held}
    raise NotEncodable(f"{path or 'argument'}: {type(value).__module__}.{type(value).__qualname__}")


def decode(node: Node) -> Any:
    """The value of a node whose leaves are tensors; a cache comes back as what it was, or as a transformers DynamicCache."""
    ((kind, content),) = node.items()
    if kind in ("tensor", "value"):
        return content
    if kind == "float":
        return float.fromhex(content)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "list":
        return [decode(item) for item in content]
    if kind == "tuple":
        return tuple(decode(item) for item in content)
    if kind == "dict":
        return {name: decode(item) for name, item in content.items()}
    if kind == "kv":
        kv = KVCache()
        for index, layer in content.items():
            kv.layers[int(index)] = layer["keys"]["tensor"], layer["values"]["tensor"]
        return kv
    if kind == "cache":
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for index, layer in content.items():
            if "window" in layer:
                _put_sliding(cache, int(index), layer["window"]["value"])
            # The cache appends to what it holds: the copy keeps the recorded tensors as they are.
            if "keys" in layer:
                cache.update(layer["keys"]["tensor"].clone(), layer["values"]["tensor"].clone(), int(index))
            if "seen" in layer:
                cache.layers[int(index)].cumulative_length = layer["seen"]["value"]
        return cache
    raise ValueError(f"a node of kind {kind!r}: not one that this version knows")


def _put_sliding(cache: Any, index: int, window: int) -> None:
    """Make layer ``index`` of a DynamicCache one that keeps the last ``window`` - 1 positions."""
    from transformers import cache_utils

    kinds: Any = cache_utils
    while len(cache.layers) <= index:
        cache.layers.append(kinds.DynamicLayer())
    cache.layers[index] = getattr(kinds, _SLIDING)(sliding_window=window)


def map_tensors(node: Node, leaf: Leaf, path: str = "") -> Node:
    """The same node with ``leaf(path, tensor)`` in the place of every tensor."""
    ((kind, content),) = node.items()
    if kind == "tensor":
        return {"tensor": leaf(path, content)}
    if kind in ("list", "tuple"):
        return {kind: [map_tensors(item, leaf, _join(path, i)) for i, item in enumerate(content)]}
    if kind == "dict":
        return {kind: {name: map_tensors(item, leaf, _join(path, name)) for name, item in content.items()}}
    if kind in ("cache", "kv"):
        return {
            kind: {
                index: {part: map_tensors(item, leaf, _join(path, index, part)) for part, item in layer.items()}
                for index, layer in content.items()
            }
        }
    return node


def tensors(node: Node) -> Iterator[tuple[str, Any]]:
    """Every (path, tensor) of a node, in its own order."""
    found: list[tuple[str, Any]] = []
    _gather(node, "", found)
    return iter(found)


def _gather(node: Node, path: str, found: list[tuple[str, Any]]) -> None:
    # A walk of its own, which builds no second node: a verification makes millions of them.
    ((kind, content),) = node.items()
    if kind == "tensor":
        found.append((path, content))
        return
    before = path + "." if path else ""
    if kind in ("list", "tuple"):
        for i, item in enumerate(content):
            _gather(item, f"{before}{i}", found)
    elif kind == "dict":
        for name, item in content.items():
            _gather(item, before + name, found)
    elif kind in ("cache", "kv"):
        for index, layer in content.items():
            for part, item in layer.items():
                _gather(item, f"{before}{index}.{part}", found)


def caches(value: Any) -> Iterator[Any]:
    """Every KV cache among (nested) arguments."""
    if _is_cache(value):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from caches(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from caches(item)


def _join(path: str, *names: object) -> str:
    return ".".join([path, *map(str, names)] if path else map(str, names))
