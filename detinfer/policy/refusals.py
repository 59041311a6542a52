"""Why an operation is refused, in words that say what to do instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detinfer.bits import dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The floating-point dtypes that the contract has orders for."""

_SCATTERED = "adds where its indices point, in the order in which they come; use one_hot and matmul, or sum the pieces"
_RUNNING = "is a running sum, whose order depends on how the tensor is cut; compute it in integers"
_CHOICE = "picks among equal values (and among +0, -0 and NaN) in an order that no proof covers"
_POOL = "sums windows in an order that no proof covers; express it with unfold and sum or matmul"

_BY_BASE = {
    "index_add": _SCATTERED,
    "scatter_add": _SCATTERED,
    "scatter_reduce": _SCATTERED,
    "index_reduce": _SCATTERED,
    "index_put": _SCATTERED,
    "_index_put_impl": _SCATTERED,
    "_unsafe_index_put": _SCATTERED,
    "put": _SCATTERED,
    "scatter": _SCATTERED,
    "bincount": _SCATTERED,
    "histc": _SCATTERED,
    "embedding_bag": _SCATTERED,
    "_embedding_bag": _SCATTERED,
    "_embedding_bag_forward_only": _SCATTERED,
    "cumsum": _RUNNING,
    "cumprod": _RUNNING,
    "logcumsumexp": _RUNNING,
    "topk": _CHOICE,
    "sort": _CHOICE,
    "argsort": _CHOICE,
    "argmax": _CHOICE,
    "argmin": _CHOICE,
    "max": _CHOICE,
    "min": _CHOICE,
    "amax": _CHOICE,
    "amin": _CHOICE,
    "aminmax": _CHOICE,
    "median": _CHOICE,
    "kthvalue": _CHOICE,
    "mode": _CHOICE,
    "avg_pool2d": _POOL,
    "avg_pool3d": _POOL,
    "_adaptive_avg_pool2d": _POOL,
    "_adaptive_avg_pool3d": _POOL,
    "convolution": "sums over channels and taps in an order that no proof covers; express it with unfold and linear",
    "arange": "adds a step that is no whole number its dtype holds exactly; make it in integers, then convert",
    "linspace": "computes its two halves from two ends; make it in integers, then convert",
}


EXAMPLES = (
    "aten::index_add",
    "aten::scatter_add",
    "aten::scatter_reduce.two",
    "aten::bincount",
    "aten::cumsum",
    "aten::cumprod",
    "aten::topk",
    "aten::sort",
    "aten::argmax",
    "aten::amax",
    "aten::convolution",
    "aten::linspace",
    "aten::bernoulli_.float",
)
"""Operations that models use and that are refused on floating point unless a family covers them."""


def base(op: str) -> str:
    """``aten::index_add_.out`` gives ``index_add``: the name without namespace, overload and in-place mark."""
    name = op.partition("::")[2].partition(".")[0]
    return name.removesuffix("_") if not name.endswith("__") else name


def reason(op: str) -> str:
    """Why ``op`` is refused on floating point when nothing covers it, and what to do."""
    known = _BY_BASE.get(base(op))
    why = f"it {known}" if known else "no proved path computes it in a fixed order"
    return f"{why}; or, if its bits may depend on the batch, list {op!r} in Policy(allow=...)"


def random(op: str) -> str:
    """The reason for an operation that draws random numbers."""
    return (
        f"it draws random numbers, so two runs differ; put the model in eval mode, or list {op!r} in Policy(allow=...)"
    )


def dtype(dtypes: Sequence[torch.dtype], device: str = "cpu") -> str:
    """The reason for a dtype without a canonical order on a kind of device."""
    names = ", ".join(dtype_name(d) for d in dtypes)
    return f"{names} has no canonical order on {device.upper()}: convert to float32, bfloat16 or float16 first"


SCALED = "torch fuses alpha * other into the sum on some machines and not on others: multiply first, then add"

FROM_INTEGERS = "it makes floating point of integers on a path that no proof covers: convert its input first"

OTHER_TREE = (
    "under scope 'tp' parts of a sum cross ranks in float32 and are joined by a tree, which detinfer's row-parallel layers "
    "do (detinfer record --policy tp); torch.distributed adds rounded parts in rank order: use scope 'batch'"
)

ELSEWHERE = (
    "a tensor is {what}, and this version keeps its promise for dense tensors on CPU and on CUDA devices only: move or "
    "convert it"
)

CAPTURED = (
    "it is not proved yet, and a proof cannot be made while a CUDA graph is being captured: run the same code once inside "
    "the policy before the capture"
)


def message(what: str, why: str, where: str = "") -> str:
    """The text of a RefusedError: the operation, where it was called, why, and what to do."""
    return f"{what} is refused{f' in {where}' if where else ''}: {why}"
