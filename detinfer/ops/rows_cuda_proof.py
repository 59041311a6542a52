"""The proof of the rows family on a GPU: that on CPU, then long rows, many rows, and rows that lie apart or unaligned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from detinfer.ops import rows_proof
from detinfer.ops.evidence import REFERENCE_NAME, Evidence, from_values, to_values
from detinfer.reference import rows as reference

LONG = (128, 1024, 4096, 8192, 20481, 152064)
"""Row lengths at which the kernels change their shape, beside the odd widths of every proof."""

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` on copies of its tensors on the current CUDA device, the results copied back."""

    def moved(*args: Any, **kwargs: Any) -> Any:
        found = function(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
        return tuple(one.cpu() for one in found) if isinstance(found, tuple) else found.cpu()

    return moved


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Whether all bytes are equal, as a tensor: found where the tensors lie."""
    return (a.contiguous().view(_INTEGERS[a.dtype]) == b.contiguous().view(_INTEGERS[b.dtype])).all()


def prove(op: str, dtype: torch.dtype, function: Callable[..., Any]) -> tuple[int, bytes]:
    """Compare ``function`` with the reference of ``op``; (results compared, their bytes), or Diverged."""
    cases, results = rows_proof.prove(op, dtype, on_gpu(function), torch.float32)
    kind = rows_proof.kind_of(op)
    if kind in ("sum", "mean", "max", "min") and "." not in op:
        return cases, results  # one row is all there is
    evidence = Evidence(op, dtype)
    for n in LONG:
        _every_row(kind, n, dtype, function, evidence)
    more, bytes_of_more = evidence.total()
    return cases + more, results + bytes_of_more


def _every_row(kind: str, n: int, dtype: torch.dtype, function: Callable[..., Any], evidence: Evidence) -> None:
    # Three rows, repeated: wherever a row lies in the tensor, it has the bytes of the reference.
    weight, bias = rows_proof.vector(n, dtype, n), rows_proof.vector(n, dtype, n + 1)
    on_device = weight.cuda(), bias.cuda()
    few, expected = _truth(kind, n, dtype, weight, bias)
    count = 131 if n <= 8192 else 7
    place = torch.arange(count, device="cuda") % 3
    x, wanted = few.cuda()[place], expected.cuda()[place]
    apart = torch.zeros(count, n + 3, dtype=dtype, device="cuda")[:, 1 : n + 1].copy_(x)
    for given, where in ((x, f"{count} rows of {n}"), (apart, f"{count} rows of {n}, apart and unaligned")):
        got = _call(kind, function, given, on_device)
        if not same_bytes(got, wanted):
            evidence.expect(got.cpu(), wanted.cpu(), where)  # raises, and names the place
        evidence.expect(got[:3].cpu(), expected, where)


def _call(kind: str, function: Callable[..., Any], x: torch.Tensor, vectors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    n = x.shape[1]
    found: Any
    if kind in ("sum", "mean", "amax", "amin"):
        found = function(x, [1])
    elif kind in ("softmax", "log_softmax"):
        found = function(x, 1, False)
    elif kind == "native_layer_norm":
        found = function(x, [n], *vectors, 1e-5)
    else:
        found = function(x, [n], vectors[0], 1e-6)
    result: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return result


def _truth(
    kind: str, n: int, dtype: torch.dtype, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(three rows, the reference's result for them)."""
    name = REFERENCE_NAME[dtype]
    if kind in ("softmax", "log_softmax"):
        x = rows_proof.logits(n, dtype)
        truth: Any = (reference.softmax if kind == "softmax" else reference.log_softmax)(to_values(x))
    elif kind in ("rms_norm", "fused_rms_norm"):
        x = rows_proof.spread(n, dtype)
        truth, _ = reference.rms_norm(to_values(x), to_values(weight), 1e-6, "fp32", name)
    elif kind == "native_layer_norm":
        x = rows_proof.cancelling(n, dtype)
        truth, _, _ = reference.layer_norm(to_values(x), to_values(weight), to_values(bias), 1e-5)
    else:
        x = rows_proof.cancelling(n, dtype)
        functions = {"sum": reference.row_sum, "mean": reference.mean, "amax": reference.greatest}
        truth = functions.get(kind, reference.least)(to_values(x))
    return x, from_values(truth, dtype)
