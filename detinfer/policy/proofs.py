"""Proofs, made when they are first needed and kept for the life of the process.

A proof belongs to an operation, a dtype and what it was made on: on CPU the instruction set that csrc runs on, since
another level is another kernel; on a GPU every kind of GPU that this process sees.
"""

from __future__ import annotations

import functools
import hashlib

import torch

from detinfer import native, ops
from detinfer.bits import dtype_name
from detinfer.errors import DetinferError, Diverged, RefusedError
from detinfer.policy.policy import Proof, Refused
from detinfer.policy.refusals import CAPTURED, message
from detinfer.torch_alone import torch_alone

_made: dict[tuple[str, torch.dtype, str, bytes], Proof | Refused] = {}


def level() -> bytes:
    """The instruction set in use by csrc; NativeError when there is no library."""
    return native.current()


@functools.cache
def gpu_level() -> bytes:
    """The kinds of GPU that this process sees."""
    return ", ".join(_gpus()).encode()


def _gpus() -> dict[str, int]:
    """The first GPU of each kind, by name."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {name: names.index(name) for name in sorted(set(names))}


def prove(op: str, dtype: torch.dtype, device: str = "cpu") -> Proof | Refused:
    """The proof of ``op`` for ``dtype`` on this machine, or the reason why there is none; made once.

    Raises RefusedError where it would have to be made while a CUDA graph is being captured, and nothing else.
    """
    try:
        subject = (op, dtype, device, level() if device == "cpu" else gpu_level())
    except DetinferError as error:
        return Refused(op, _path_of(op, device), str(error))
    found = _made.get(subject)
    if found is None:
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RefusedError(message(f"{op} on {dtype_name(dtype)}", CAPTURED))
        found = _made[subject] = _prove(*subject)
    return found


def _prove(op: str, dtype: torch.dtype, device: str, level: bytes) -> Proof | Refused:
    where = _path_of(op, device)
    try:
        with torch_alone():
            cases, results = ops.prove(op, dtype) if device == "cpu" else _on_every_kind(op, dtype, device)
    except Diverged as error:
        return Refused(op, where, f"its proof failed on this machine ({level.decode()}): {error}")
    except DetinferError as error:
        return Refused(op, where, str(error))
    except Exception as error:  # fail closed: whatever went wrong, nothing was proved
        return Refused(op, where, f"its proof did not run: {type(error).__name__}: {error}")
    if cases < 1:
        return Refused(op, where, "its proof compared nothing")
    subject = f"{op} {dtype_name(dtype)}{'' if device == 'cpu' else f' {device}'}"
    return Proof(subject, _against(op, device), cases, hashlib.sha256(results).hexdigest())


def _on_every_kind(op: str, dtype: torch.dtype, device: str) -> tuple[int, bytes]:
    cases, results = 0, b""
    for index in _gpus().values():
        with torch.cuda.device(index):
            count, results = ops.prove(op, dtype, device)
        cases += count
    return cases, results


def path(family: str, device: str) -> str:
    """The path of a family's operations on a kind of device: ``csrc/rows`` on CPU, ``cuda/rows``."""
    return f"csrc/{family}" if device == "cpu" else f"{device}/{family.removesuffix(f'_{device}')}"


def _path_of(op: str, device: str) -> str:
    found = ops.covered(device).get(op)
    if found is not None:
        return found.elsewhere or path(found.family, device)
    return "torch" if device == "cpu" else f"torch/{device}"


def _against(op: str, device: str) -> str:
    found = ops.covered(device).get(op)
    family = found.family if found is not None else "elementwise"
    return f"detinfer.reference.{family.removesuffix(f'_{device}')}"
