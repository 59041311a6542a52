"""Kernels that hooks call by their Python functions: proved, decided and counted as operations of torch are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from detinfer.bits import dtype_name
from detinfer.errors import DetinferError, RefusedError
from detinfer.policy.policy import Accepted, Decision, Proof, Refused
from detinfer.policy.proofs import gpu_level, level
from detinfer.policy.refusals import CAPTURED, message
from detinfer.policy.state import STATE
from detinfer.torch_alone import torch_alone

Prove = Callable[[torch.dtype], tuple[int, bytes]]
"""Compares a kernel with its reference: how many results were compared, and their bytes; raises Diverged."""

_made: dict[tuple[str, torch.dtype, str, bytes], Decision] = {}


def settle(op: str, tensor: torch.Tensor, path: str, prove: Prove, portable: bool = True) -> None:
    """Make the proof of ``op`` for the dtype and device of ``tensor``, once, and note the decision.

    Raises RefusedError where there is no proof, where bits that are not ``portable`` are asked to be, and where the proof
    would have to be made while a CUDA graph is being captured.
    """
    device = tensor.device.type
    subject = (op, tensor.dtype, device, gpu_level() if device == "cuda" else level())
    decision = _made.get(subject)
    if decision is None:
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RefusedError(message(f"{op} on {dtype_name(tensor.dtype)}", CAPTURED))
        decision = _made[subject] = _decide(op, tensor, path, prove, portable)
    if STATE.policy().guarantee.place == "portable" and isinstance(decision, Accepted) and not portable:
        decision = Refused(op, path, "its bits are not portable: use place 'here', or leave the operation out")
    trace = STATE.trace()
    if trace is not None:
        trace.note((op, (tensor.dtype,)), decision, (tensor,))
    if isinstance(decision, Refused):
        where = trace.where() if trace is not None else ""
        raise RefusedError(message(f"{op} on {dtype_name(tensor.dtype)}", decision.reason, where))


def _decide(op: str, tensor: torch.Tensor, path: str, prove: Prove, portable: bool) -> Decision:
    try:
        with torch_alone():
            cases, results = prove(tensor.dtype)
    except DetinferError as error:
        return Refused(op, path, str(error))
    except Exception as error:  # fail closed: whatever went wrong, nothing was proved
        return Refused(op, path, f"its proof did not run: {type(error).__name__}: {error}")
    subject = f"{op} {dtype_name(tensor.dtype)}{'' if tensor.device.type == 'cpu' else ' ' + tensor.device.type}"
    proof = Proof(subject, "detinfer.reference", cases, hashlib.sha256(results).hexdigest())
    return Accepted(op, path, "canonical order", proof, portable=portable)
