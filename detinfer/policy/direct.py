"""Kernels that hooks call by their Python functions: proved, decided and counted as operations of torch are."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import torch

from detinfer.bits import dtype_name
from detinfer.errors import DetinferError, RefusedError
from detinfer.policy.policy import Accepted, Decision, Proof, Refused
from detinfer.policy.proofs import level
from detinfer.policy.refusals import message
from detinfer.policy.state import STATE

Prove = Callable[[torch.dtype], tuple[int, bytes]]
"""Compares a kernel with its reference: how many results were compared, and their bytes; raises Diverged."""


def settle(op: str, tensor: torch.Tensor, path: str, prove: Prove) -> None:
    """Make the proof of ``op`` for the dtype of ``tensor``, once, and note the decision; RefusedError without one."""
    decision = _decision(op, tensor.dtype, path, prove, level())
    trace = STATE.trace()
    if trace is not None:
        trace.note((op, (tensor.dtype,)), decision, (tensor,))
    if isinstance(decision, Refused):
        where = trace.where() if trace is not None else ""
        raise RefusedError(message(f"{op} on {dtype_name(tensor.dtype)}", decision.reason, where))


@functools.cache
def _decision(op: str, dtype: torch.dtype, path: str, prove: Prove, level: bytes) -> Decision:
    try:
        with STATE.torch_alone():
            cases, results = prove(dtype)
    except DetinferError as error:
        return Refused(op, path, str(error))
    except Exception as error:  # fail closed: whatever went wrong, nothing was proved
        return Refused(op, path, f"its proof did not run: {type(error).__name__}: {error}")
    proof = Proof(f"{op} {dtype_name(dtype)}", "detinfer.reference", cases, hashlib.sha256(results).hexdigest())
    return Accepted(op, path, "canonical order", proof, portable=True)
