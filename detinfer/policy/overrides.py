"""Covered operations put in the place of torch's kernels on one kind of device, for the whole process, until removed.

One ``torch.library.Library`` holds them all. An override proves its path before the first call of each dtype, and
hands a call that its function does not take (its tensors are all integers) to the kernel that it stands in front of.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detinfer.errors import RefusedError
from detinfer.policy.decide import decide
from detinfer.policy.families import Families
from detinfer.policy.overloads import adapt, forms
from detinfer.policy.policy import Accepted
from detinfer.policy.refusals import FROM_INTEGERS, message
from detinfer.policy.state import STATE
from detinfer.torch_alone import ALONE


class Overrides:
    """Every form of every covered operation, installed for the dispatcher's key of their device until ``remove``."""

    def __init__(self, families: Families) -> None:
        self.families = families
        key = torch._C._dispatch_key_for_device(families.device)
        library: Any = torch.library.Library  # untyped in torch
        self._library = library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                # torch warns once that a kernel is replaced: that is what a policy is for.
                warnings.filterwarnings("ignore", message="(?s).*overriding a previously registered kernel")
                for op, found in families.covered.items():
                    for overload in forms(op):
                        if overload.name != op and overload.name in families.covered:
                            continue  # the family has a function of its own for this form
                        original = _kernel(overload.name, key)
                        call = _override(overload.name, adapt(found.function, overload), original, families)
                        name = overload.name.removeprefix("aten::")
                        self._library.impl(name, call, key, with_keyset=True, allow_override=True)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Give the key back to torch's own kernels."""
        self._library._destroy()


def _kernel(name: str, key: str) -> Any:
    """torch's own kernel; where it has none (a build without CUDA), one that refuses what would be handed to it."""
    try:
        return torch.library.get_kernel(name, key)
    except RuntimeError:
        return _Absent(name, key)


class _Absent:
    def __init__(self, name: str, key: str) -> None:
        self._why = message(
            name, f"this torch has no kernel of its own for {key}, and detinfer's does not take the call"
        )

    def call_boxed(self, *args: Any, **kwargs: Any) -> Any:
        raise RefusedError(self._why)


def _override(name: str, function: Callable[..., Any], original: Any, families: Families) -> Callable[..., Any]:
    proved: defaultdict[bytes, set[torch.dtype]] = defaultdict(set)
    level = families.level

    def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if ALONE.here():
            return original.call_boxed(keys, *args, **kwargs)
        done = proved[level()]
        for a in args:
            if isinstance(a, Tensor) and a.dtype not in done and not settle(a.dtype, done):
                return original.call_boxed(keys, *args, **kwargs)
        result = function(*args, **kwargs)
        if result is NotImplemented:
            result = original.call_boxed(keys, *args, **kwargs)
            if isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex()):
                check_allowed()
        elif isinstance(result, Tensor) and result.dtype not in done and not settle(result.dtype, done):
            # The function made floating point of integers, but the policy sends that dtype to torch's own kernel.
            return original.call_boxed(keys, *args, **kwargs)
        return result

    def settle(dtype: torch.dtype, done: set[torch.dtype]) -> bool:
        """Whether the covered path may take ``dtype``; False when the policy sends it to torch's own."""
        if dtype.is_floating_point or dtype.is_complex:
            decision = decide(STATE.policy(), name, (dtype,), families.known)
            if not isinstance(decision, Accepted):
                raise RefusedError(message(f"{name} on {dtype}", decision.reason))
            if decision.proof is None:
                return False
        done.add(dtype)
        return True

    def check_allowed() -> None:
        """Integers in, floating point out, on torch's kernel: exact nothing, proved nothing."""
        if name not in STATE.policy().allow:
            raise RefusedError(message(f"{name} on integers", FROM_INTEGERS))

    return call
