"""Proofs, made when they are first needed and kept for the life of the process.

A proof belongs to an operation, a dtype and the instruction set that csrc runs on: another level is another kernel.
"""

from __future__ import annotations

import functools
import hashlib

import torch

from detinfer import native, ops
from detinfer.bits import dtype_name
from detinfer.errors import DetinferError, Diverged
from detinfer.policy.policy import Proof, Refused
from detinfer.policy.state import STATE


def level() -> bytes:
    """The instruction set in use by csrc; NativeError when there is no library."""
    return native.current()


def prove(op: str, dtype: torch.dtype) -> Proof | Refused:
    """The proof of ``op`` for ``dtype`` on this machine, or the reason why there is none; made once, never raises."""
    try:
        return _prove(op, dtype, level())
    except DetinferError as error:
        return Refused(op, _path(op), str(error))


@functools.cache
def _prove(op: str, dtype: torch.dtype, level: bytes) -> Proof | Refused:
    path = _path(op)
    try:
        with STATE.torch_alone():
            cases, results = ops.prove(op, dtype)
    except Diverged as error:
        return Refused(op, path, f"its proof failed on this machine ({level.decode()}): {error}")
    except DetinferError as error:
        return Refused(op, path, str(error))
    except Exception as error:  # fail closed: whatever went wrong, nothing was proved
        return Refused(op, path, f"its proof did not run: {type(error).__name__}: {error}")
    if cases < 1:
        return Refused(op, path, "its proof compared nothing")
    return Proof(f"{op} {dtype_name(dtype)}", _against(op), cases, hashlib.sha256(results).hexdigest())


def _path(op: str) -> str:
    found = ops.covered().get(op)
    return f"csrc/{found.family}" if found is not None else "torch"


def _against(op: str) -> str:
    found = ops.covered().get(op)
    return f"detinfer.reference.{found.family if found is not None else 'elementwise'}"
