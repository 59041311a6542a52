"""See every operation under a policy, decide each kind once, and refuse what nothing covers.

This is a dispatch mode: it sees what the overrides cannot, the operations that nobody covers. It costs a few
microseconds per call, so a sweep that was traced once may run its later trials on the overrides alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from detinfer.bits import dtype_name
from detinfer.errors import RefusedError
from detinfer.policy.calls import Call, cooked, raw
from detinfer.policy.copies import variant, varies
from detinfer.policy.decide import FROM_INTEGERS, Known, decide
from detinfer.policy.policy import Decision, Policy, Refused
from detinfer.policy.refusals import ON_CPU, message

Key = tuple[str, tuple[torch.dtype, ...]]
"""An operation and the dtypes of its tensors (and of the result, where one was asked for), each once."""

OnCall = Callable[[str, tuple[Any, ...], dict[str, Any], Decision], None]
"""Called with an operation's name, its arguments and the decision, just before it runs."""


@dataclass
class _Kind:
    """What is decided about one operation on one combination of dtypes, and how often it was called."""

    key: Key
    decision: Decision
    reduces: bool
    decomposes: bool
    exact: bool
    variant: str
    count: int = 0


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Decides every operation that the entering thread calls on CPU tensors; raises RefusedError.

    Tensors that hold no values (meta, FakeTensor) pass through. ``decisions`` holds what was decided, in order of
    first use. ``where`` gives the place in the model, for a refusal's message.
    """

    def __init__(self, policy: Policy, known: Known, where: Callable[[], str], on_call: OnCall | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.decisions: dict[Key, Decision] = {}
        self.suspended = 0
        self._policy, self._known, self._where, self._on_call = policy, known, where, on_call
        self._operations: dict[Any, tuple[str, bool]] = {}
        self._kinds: dict[Any, _Kind] = {}
        self._calls: dict[Any, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap __torch_dispatch__ in a guard against compilation: seconds of imports at the first call and
        # microseconds at each. ``deterministic`` keeps compiled code from running at all.
        return False

    @property
    def counts(self) -> dict[Key, int]:
        """How often each operation was called on each combination of dtypes."""
        counts: dict[Key, int] = {}
        for kind in self._kinds.values():
            if kind.count:
                counts[kind.key] = counts.get(kind.key, 0) + kind.count
        return counts

    @property
    def calls(self) -> dict[Call, int]:
        """Each call of a reducing operation and how often it was made, in order of first use."""
        return {cooked(*call): count for call, count in self._calls.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.suspended:  # a policy entered inside this one answers
            return func(*args, **kwargs)
        if types:
            fake = any(issubclass(t, FakeTensor) for t in types)
            # Any other subclass goes first: what it then calls on plain tensors comes back here.
            return func(*args, **kwargs) if fake else NotImplemented
        dtypes: dict[torch.dtype, None] = {}
        wanted: list[torch.dtype] = []
        odd = _scan(args, dtypes, wanted) or (_scan(kwargs.values(), dtypes, wanted) if kwargs else None)
        if odd is not None:
            if odd[0].is_meta:
                return func(*args, **kwargs)
            raise RefusedError(message(func.name(), ON_CPU.format(what=_place(odd[0])), self._where()))
        name, changes = self._operations.get(func) or self._note(func)
        what = variant(name, args, kwargs) if changes else ""
        kind = self._kinds.get((func, what, *wanted, None, *dtypes))
        if kind is None:
            kind = self._decide(func, what, wanted, dtypes)
        if kind.decomposes:
            with self:
                return func.decompose(*args, **kwargs)
        if isinstance(kind.decision, Refused):
            raise self._refusal(kind)
        if self._on_call is not None:
            self._on_call(name, args, kwargs, kind.decision)
        kind.count += 1
        if kind.reduces:
            call = (name, raw(args), tuple(kwargs), raw(tuple(kwargs.values())))
            self._calls[call] = self._calls.get(call, 0) + 1
        result = func(*args, **kwargs)
        if kind.exact:
            self._check_result(func, kind, result)
        return result

    def _note(self, func: Any) -> tuple[str, bool]:
        name = func.name()
        self._operations[func] = found = (name, name in _VARIES)
        return found

    def _decide(
        self, func: Any, what: str, wanted: list[torch.dtype], operands: dict[torch.dtype, None], key: Any = None
    ) -> _Kind:
        name = func.name()
        dtypes = tuple(dict.fromkeys((*operands, *wanted)))
        from_integers = any(map(_floating, wanted)) and not any(map(_floating, operands))
        decision = decide(
            self._policy, name, dtypes, self._known, variant=what or (FROM_INTEGERS if from_integers else "")
        )
        family = self._known.covered.get(name)
        refused = isinstance(decision, Refused)
        decomposes = refused and family is None and _is_composite(func)
        if not decomposes:
            self.decisions[name, dtypes] = decision
        kind = _Kind(
            key=(name, dtypes),
            decision=decision,
            reduces=family is not None and family.reduces and any(map(_floating, dtypes)),
            decomposes=decomposes,
            exact=not refused and not any(map(_floating, dtypes)),
            variant=what,
        )
        self._kinds[(func, what, *wanted, None, *operands) if key is None else key] = kind
        return kind

    def _check_result(self, func: Any, kind: _Kind, result: Any) -> None:
        """Integers in, floating point out: another question, whose answer depends on the result's dtype."""
        if not isinstance(result, Tensor) or not _floating(result.dtype):
            return
        key = (func, kind.variant, FROM_INTEGERS, result.dtype, *kind.key[1])
        found = self._kinds.get(key)
        if found is None:
            found = self._decide(func, kind.variant, [result.dtype], dict.fromkeys(kind.key[1]), key)
        if isinstance(found.decision, Refused):
            raise self._refusal(found)

    def _refusal(self, kind: _Kind) -> RefusedError:
        op, dtypes = kind.key
        on = f" on {', '.join(map(dtype_name, dtypes))}" if dtypes else ""
        return RefusedError(message(op + on, kind.decision.reason, self._where()))


_VARIES = frozenset(varies())
_PLAIN = frozenset({int, float, bool, str, type(None), torch.device, torch.layout, torch.memory_format})


def _scan(values: Iterable[Any], dtypes: dict[torch.dtype, None], wanted: list[torch.dtype]) -> tuple[Tensor] | None:
    """Note the dtypes of tensors and the dtypes asked for; returns the first tensor that is not dense on CPU."""
    for a in values:
        if type(a) in _PLAIN:
            continue
        if isinstance(a, Tensor):
            if not a.is_cpu or a.layout is not torch.strided:
                return (a,)
            dtypes[a.dtype] = None
        elif isinstance(a, list | tuple):
            if (odd := _scan(a, dtypes, wanted)) is not None:
                return odd
        elif isinstance(a, torch.dtype):
            wanted.append(a)
    return None


def _floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _place(tensor: Tensor) -> str:
    return f"on {tensor.device}" if not tensor.is_cpu else f"of layout {str(tensor.layout).removeprefix('torch.')}"


def _is_composite(func: Any) -> bool:
    composite: bool = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return composite
