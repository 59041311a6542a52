"""Scaled dot product attention in one order: every query row is a function of itself and of its unmasked keys.

The order of one query row over its unmasked keys ``j_0 < j_1 < ...``, all of it in fp32 whatever the dtype::

    s_j = (chain of FMAs q_d * k_jd over d ascending, from +0) * scale [+ mask_j]
    m   = the greatest s_j, exact
    p_j = exp(s_j - m), the exp of the elementwise family
    l   = row_sum of p_j, lanes counted over the unmasked keys alone
    o_d = chain of FMAs p_j * v_jd over j ascending, from +0
    out = o_d / l, rounded once to the dtype

In the contract's terms the whole row is one block: the greatest score is known before the first exponential, nothing
is rescaled, and no number of blocks, splits or groups exists to depend on. So prefill, prefill in chunks, single-token
decode, any batch, any padding and any number of threads give the same bytes.

A masked key (False in a bool mask, -inf in a float mask, past the diagonal of ``is_causal``) contributes nothing: its
K and V are never used, NaN included. A row without an unmasked key gives +0. Other values of a float mask are added
in fp32 after the scale, and their keys count, however small the value.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from detinfer import native
from detinfer.errors import RefusedError, UsageError
from detinfer.ops import attention_proof

NAME = "aten::scaled_dot_product_attention"

_MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}
_KEPT_CALLS = 4096


class _Strides(ctypes.Structure):
    _fields_ = [("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64)]


class _Plan(ctypes.Structure):
    """AttentionPlan of csrc/attention.h."""

    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("mask_kind", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("value_depth", ctypes.c_int64),
        ("q", _Strides),
        ("k", _Strides),
        ("v", _Strides),
        ("mask", _Strides),
        ("out", _Strides),
    ]


_args = struct.Struct("@6P")  # AttentionArgs of csrc/attention.h
_pack_args = _args.pack


_Views = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"]


class _Call:
    """Everything about a call but its pointers: made once for a set of shapes, strides, dtypes and options."""

    __slots__ = ("address", "dtype", "plan", "run", "shape", "stride")

    def __init__(self, plan: _Plan, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> None:
        self.run = native.entry("attention", _args.size + ctypes.sizeof(_Plan))
        self.plan = plan
        self.address = ctypes.addressof(plan)
        self.shape = shape
        self.stride = stride
        self.dtype = dtype


_calls: dict[tuple[Any, ...], _Call] = {}


def _run(
    call: _Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    out = torch.empty_strided(call.shape, call.stride, dtype=call.dtype)
    mask_pointer = 0 if mask is None else mask.data_ptr()
    pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr(), mask_pointer, out.data_ptr())
    if (status := call.run(_pack_args(call.address, *pointers))) != 0:
        native.check(status)
    return out


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query @ key.mT * scale + mask) @ value in the order of this module; the arguments are torch's.

    ``query`` is [..., H, Lq, D], ``key`` [..., Hkv, Lk, D], ``value`` [..., Hkv, Lk, Dv]: fp32, bf16 or fp16, all
    three alike, of two dimensions or more, with any strides; leading dimensions broadcast. Hkv is H, or divides it with
    ``enable_gqa``. ``attn_mask`` is bool (False: masked), fp32 or of the query's dtype, and broadcasts to
    [..., H, Lq, Lk]; ``is_causal`` lets row i see the keys 0..i, on top of a mask if both are given. ``scale`` is used
    in fp32; left out, it is 1 / sqrt(D), computed in double and rounded to fp32 once. Returns a fresh
    [..., H, Lq, Dv], laid out as torch does: like ``query`` if it has its shape, else contiguous.

    Raises RefusedError for dropout, UnsupportedDtype for float64 and complex, UsageError for shapes or dtypes that do
    not fit; returns NotImplemented for integers.
    """
    signature = (
        query.dtype, key.dtype, value.dtype, query.shape, key.shape, value.shape,
        query.stride(), key.stride(), value.stride(), dropout_p, is_causal, scale, enable_gqa,
        None if attn_mask is None else (attn_mask.dtype, attn_mask.shape, attn_mask.stride()),
    )  # fmt: skip
    call = _calls.get(signature)
    if call is not None:
        return _run(call, query, key, value, attn_mask)
    if not (query.is_floating_point() or query.is_complex()):
        return NotImplemented
    refuse(query, key, value, attn_mask, dropout_p)
    given = (query, key, value, attn_mask)
    shape, seen = views(query, key, value, attn_mask, enable_gqa)
    call = plan(query, shape, seen, is_causal, scale)
    if all(_in_place(a, b) for a, b in zip(seen, given, strict=True)):
        if len(_calls) >= _KEPT_CALLS:
            _calls.clear()
        _calls[signature] = call
    return _run(call, *seen)


def _in_place(view: torch.Tensor | None, tensor: torch.Tensor | None) -> bool:
    """Whether a view reads the caller's own memory, so that its strides hold for the next call too."""
    return view is tensor or (view is not None and tensor is not None and view.data_ptr() == tensor.data_ptr())


def refuse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout_p: float
) -> None:
    """Raise for what no layout would make right."""
    if dropout_p != 0.0:
        raise RefusedError(f"{NAME}: dropout_p={dropout_p} draws random numbers; call model.eval(), or pass 0")
    native.dtype_code(query.dtype, NAME)
    dtypes = [t.dtype for t in (query, key, value)]
    if len(set(dtypes)) != 1:
        raise UsageError(f"{NAME}: query, key and value are {dtypes}; convert them to one dtype")
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise UsageError(f"{NAME}: the mask is {mask.dtype}; use bool, float32 or the query's {query.dtype}")
    shapes = [list(t.shape) for t in (query, key, value)]
    if min(map(len, shapes)) < 2 or shapes[0][-1] != shapes[1][-1] or shapes[1][-2] != shapes[2][-2]:
        raise UsageError(
            f"{NAME}: query, key and value are {shapes}; they must be [..., Lq, D], [..., Lk, D], [..., Lk, Dv]"
        )


def views(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, enable_gqa: bool
) -> tuple[tuple[int, ...], _Views]:
    """The result's shape; the tensors as [B, H, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv] and [B, H, Lq, Lk].

    Broadcast dimensions have stride 0. Copies are made only of what is not contiguous in its last dimension or has
    more than four dimensions.
    """
    q, k, v = (t[(None,) * (4 - t.dim())] for t in (query, key, value))
    try:
        batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        heads, k_heads, v_heads = q.shape[-3], k.shape[-3], v.shape[-3]
        if enable_gqa and k_heads != v_heads:
            k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
        elif not enable_gqa and (k_heads, v_heads) != (1, 1):
            heads = np.broadcast_shapes((heads,), (k_heads,), (v_heads,))[0]
            k, v = (t.expand(*t.shape[:-3], heads, -1, -1) for t in (k, v))
        if heads % max(k.shape[-3], 1) != 0 or (heads != 0 and k.shape[-3] == 0):
            raise RuntimeError(f"{heads} query heads are no multiple of {k.shape[-3]} key and value heads")
        q, k, v = (
            _four(q.expand(*batch, heads, -1, -1)),
            _four(k.expand(*batch, -1, -1, -1)),
            _four(v.expand(*batch, -1, -1, -1)),
        )
        if mask is not None:
            mask = _contiguous(mask.expand(*mask.shape[:-1], k.shape[2]))
            mask = _four(mask.expand(*batch, heads, q.shape[2], k.shape[2]))
    except (RuntimeError, ValueError) as error:
        shapes = [list(t.shape) for t in (query, key, value, mask) if t is not None]
        raise UsageError(f"{NAME}: tensors of {shapes} do not fit each other: {error}") from None
    dims = max(query.dim(), key.dim(), value.dim())
    return (*batch, heads, q.shape[2], v.shape[3])[-dims:], (q, k, v, mask)


def _contiguous(t: torch.Tensor) -> torch.Tensor:
    """A tensor whose last dimension has stride 1: itself, if it can be."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _four(t: torch.Tensor) -> torch.Tensor:
    return _contiguous(t if t.dim() == 4 else t.reshape(math.prod(t.shape[:-3]), *t.shape[-3:]))


def _repeat_heads(t: torch.Tensor, heads: int) -> torch.Tensor:
    """[..., H', L, D] as [..., heads, L, D], each head repeated in place."""
    if t.shape[-3] == 0 or heads % t.shape[-3] != 0:
        raise RuntimeError(f"{heads} query heads are no multiple of {t.shape[-3]} key or value heads")
    return t.unsqueeze(-3).expand(*t.shape[:-2], heads // t.shape[-3], *t.shape[-2:]).flatten(-4, -3)


def plan(given: torch.Tensor, shape: tuple[int, ...], views: _Views, is_causal: bool, scale: float | None) -> _Call:
    """The call for these four-dimensional views; ``given`` is the query as the caller has it."""
    query, key, value, mask = views
    (batch, heads, queries, depth), (keys, value_depth) = query.shape, value.shape[2:]
    if scale is None:
        scale = 1.0 / math.sqrt(depth) if depth else 1.0
    stride: tuple[int, ...] = (heads * queries * value_depth, queries * value_depth, value_depth, 1)
    if given.dim() == 4 and given.shape == shape and (like := torch.empty_like(given).stride())[3] == 1:
        stride = like
    mask_kind = 0 if mask is None else _MASK_KINDS[mask.dtype]
    plan = _Plan(
        native.dtype_code(query.dtype, NAME), mask_kind, is_causal, scale,
        batch, heads, key.shape[1], queries, keys, depth, value_depth,
        *(_Strides(*(t.stride()[:3] if t is not None else ())) for t in views), _Strides(*stride[:3]),
    )  # fmt: skip
    return _Call(plan, shape, stride if len(shape) == 4 else torch.empty(shape, device="meta").stride(), query.dtype)


COVERED: dict[str, Callable[..., Any]] = {NAME: scaled_dot_product_attention}
"""``aten::name``: the function that computes it, with the schema's own signature."""

REDUCES: frozenset[str] = frozenset({NAME})
"""Those of them that contain a reduction."""


def prove(op: str, dtype: torch.dtype) -> tuple[int, bytes]:
    """Compare the kernel with ``detinfer.reference.attention`` on stress inputs: (results compared, their bytes).

    Raises Diverged with the first difference, UnsupportedDtype for a dtype without an order.
    """
    native.dtype_code(dtype, op)
    return attention_proof.prove(op, dtype, COVERED[op])
