"""See every operation under a policy, decide each kind once, and refuse what nothing covers.

This is a dispatch mode: it sees what the overrides cannot, the operations that nobody covers. It costs a few
microseconds per call, so a sweep that was traced once may run its later trials on the overrides alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from detinfer.bits import dtype_name
from detinfer.errors import RefusedError
from detinfer.policy.calls import Call, cooked, raw
from detinfer.policy.collectives import COVERED, FORWARDS
from detinfer.policy.decide import Known, decide
from detinfer.policy.policy import Decision, Policy, Refused
from detinfer.policy.refusals import ELSEWHERE, message
from detinfer.policy.variants import VARIES, variant

Key = tuple[str, tuple[torch.dtype, ...]]
"""An operation and the dtypes of its tensors (and of the result, where one was asked for), each once.

On another device than CPU the operation is followed by the kind of device: ``aten::mm on cuda``.
"""

OnCall = Callable[[str, tuple[Any, ...], dict[str, Any], Decision], None]
"""Called with an operation's name, its arguments and the decision, just before it runs."""


@dataclass
class _Kind:
    """What is decided about one operation on one combination of dtypes, and how often it was called."""

    key: Key
    decision: Decision
    refused: bool
    reduces: bool
    decomposes: bool
    exact: bool
    variant: str
    count: int = 0


@dataclass
class _Operation:
    """One operation and what is decided about it, by variant and dtypes."""

    name: str
    varies: bool
    collective: bool
    kinds: dict[Any, _Kind] = field(default_factory=dict)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Decides every operation that the entering thread calls, by the device of its tensors; raises RefusedError.

    An operation with tensors on a GPU runs there, whatever else it is given (scalars and indices may be on CPU). Tensors that hold no values (meta, FakeTensor) pass through. ``decisions`` holds what was decided, in order of
    first use. ``where`` gives the place in the model, for a refusal's message.
    """

    def __init__(self, policy: Policy, known: Known, where: Callable[[], str], on_call: OnCall | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.decisions: dict[Key, Decision] = {}
        self.suspended = 0
        self._policy, self._known, self._where, self._on_call = policy, known, where, on_call
        self._operations: dict[Any, _Operation] = {}
        self._calls: dict[Any, int] = {}
        self._noted: dict[Key, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap __torch_dispatch__ in a guard against compilation: seconds of imports at the first call and
        # microseconds at each. ``deterministic`` keeps compiled code from running at all.
        return False

    def note(self, key: Key, decision: Decision, args: tuple[Any, ...]) -> None:
        """A collective was decided, and runs next unless it is refused."""
        self.decisions.setdefault(key, decision)
        if isinstance(decision, Refused):
            return
        if self._on_call is not None:
            self._on_call(decision.op, args, {}, decision)
        self._noted[key] = self._noted.get(key, 0) + 1

    def where(self) -> str:
        """The place in the model of what runs now; empty outside of one."""
        return self._where()

    @property
    def counts(self) -> dict[Key, int]:
        """How often each operation was called on each combination of dtypes."""
        counts = dict(self._noted)
        for kind in (kind for operation in self._operations.values() for kind in operation.kinds.values()):
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
        if any(t is not Tensor for t in types):  # torch names Tensor itself where a view changes the dtype
            fake = any(issubclass(t, FakeTensor) for t in types)
            # Any other subclass goes first: what it then calls on plain tensors comes back here.
            return func(*args, **kwargs) if fake else NotImplemented
        dtypes: dict[torch.dtype, None] = {}
        wanted: list[torch.dtype] = []
        known = self._known
        odd = _scan(args, dtypes, wanted) or (_scan(kwargs.values(), dtypes, wanted) if kwargs else None)
        if odd is not None:
            if odd[0].is_meta:
                return func(*args, **kwargs)
            dtypes.clear()
            wanted.clear()
            known, odd = self._scan_elsewhere(args, kwargs, dtypes, wanted)
            if odd is not None:
                raise RefusedError(message(func.name(), ELSEWHERE.format(what=_place(odd[0])), self._where()))
        operation = self._operations.get(func)
        if operation is None:
            name = func.name()
            operation = self._operations[func] = _Operation(name, name in VARIES, name in COVERED or name in FORWARDS)
        if operation.collective:
            return func(*args, **kwargs)  # its override knows the group: it decides, and notes it here
        what = variant(operation.name, args, kwargs) if operation.varies else ""
        key = (known.device, what, *wanted, None, *dtypes)
        kind = operation.kinds.get(key) or self._decide(func, operation, key, what, wanted, dtypes, known)
        if kind.decomposes:
            with self:
                return func.decompose(*args, **kwargs)
        if kind.refused:
            raise self._refusal(kind)
        if self._on_call is not None:
            self._on_call(operation.name, args, kwargs, kind.decision)
        kind.count += 1
        if kind.reduces:
            call = (operation.name, raw(args), tuple(kwargs), raw(kwargs.values()))
            self._calls[call] = self._calls.get(call, 0) + 1
        result = func(*args, **kwargs)
        if kind.exact:
            self._check_result(func, operation, kind, result, known)
        return result

    def _scan_elsewhere(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], dtypes: dict[torch.dtype, None], wanted: list[torch.dtype]
    ) -> tuple[Known, tuple[Tensor] | None]:
        """What is known of the device that the call runs on, or the tensor that no promise covers."""
        devices: set[str] = set()
        odd = _scan_all(args, dtypes, wanted, devices) or _scan_all(kwargs.values(), dtypes, wanted, devices)
        devices.discard("cpu")
        if odd is None and len(devices) == 1 and (known := self._known.elsewhere.get(*devices)) is not None:
            return known, None
        return self._known, odd or (next(t for t in _tensors((args, kwargs.values())) if not t.is_cpu),)

    def _decide(
        self,
        func: Any,
        operation: _Operation,
        key: Any,
        what: str,
        wanted: Iterable[torch.dtype],
        operands: Iterable[torch.dtype],
        known: Known,
    ) -> _Kind:
        name, dtypes = operation.name, tuple(dict.fromkeys((*operands, *wanted)))
        decision = decide(self._policy, name, dtypes, known, variant=what)
        family = known.covered.get(name)
        refused, floating = isinstance(decision, Refused), any(map(_floating, dtypes))
        operation.kinds[key] = kind = _Kind(
            key=(name if known.device == "cpu" else f"{name} on {known.device}", dtypes),
            decision=decision,
            refused=refused,
            reduces=family is not None and family.reduces and floating,
            decomposes=refused and family is None and _is_composite(func),
            exact=not refused and not floating,
            variant=what,
        )
        if not kind.decomposes:
            self.decisions[kind.key] = decision
        return kind

    def _check_result(self, func: Any, operation: _Operation, kind: _Kind, result: Any, known: Known) -> None:
        """Integers in, floating point out: another question, whose answer depends on the result's dtype."""
        if not isinstance(result, Tensor) or not _floating(result.dtype):
            return
        dtypes = kind.key[1]
        key = (known.device, kind.variant, "result", result.dtype, *dtypes)
        found = operation.kinds.get(key) or self._decide(
            func, operation, key, kind.variant, [result.dtype], dtypes, known
        )
        if found.refused:
            raise self._refusal(found)

    def _refusal(self, kind: _Kind) -> RefusedError:
        op, dtypes = kind.key
        on = f"{', ' if ' on ' in op else ' on '}{', '.join(map(dtype_name, dtypes))}" if dtypes else ""
        return RefusedError(message(op + on, kind.decision.reason, self._where()))


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


def _scan_all(
    values: Iterable[Any], dtypes: dict[torch.dtype, None], wanted: list[torch.dtype], devices: set[str]
) -> tuple[Tensor] | None:
    """``_scan`` for tensors on any device, whose kinds it notes; returns the first tensor that is not dense."""
    for a in values:
        if type(a) in _PLAIN:
            continue
        if isinstance(a, Tensor):
            if a.layout is not torch.strided:
                return (a,)
            devices.add("cuda" if a.is_cuda else a.device.type)
            dtypes[a.dtype] = None
        elif isinstance(a, list | tuple):
            if (odd := _scan_all(a, dtypes, wanted, devices)) is not None:
                return odd
        elif isinstance(a, torch.dtype):
            wanted.append(a)
    return None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for a in values:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, Iterable) and not isinstance(a, str):
            yield from _tensors(a)


def _floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _place(tensor: Tensor) -> str:
    return f"on {tensor.device}" if not tensor.is_cpu else f"of layout {str(tensor.layout).removeprefix('torch.')}"


def _is_composite(func: Any) -> bool:
    composite: bool = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return composite
