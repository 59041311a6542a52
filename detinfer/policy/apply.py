"""``deterministic``: put a policy in force for the code inside a block, and take it out again whatever happens."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, TypeVar, cast

import torch

from detinfer.errors import RefusedError, UsageError
from detinfer.policy.active import Active
from detinfer.policy.configured import configured
from detinfer.policy.families import Families, own
from detinfer.policy.installed import Installed
from detinfer.policy.modules import ModuleStack
from detinfer.policy.policy import Guarantee, Policy, Scope
from detinfer.policy.state import STATE, Entry
from detinfer.policy.switches import check_switches
from detinfer.policy.trace import OnCall, Trace
from detinfer.torch_alone import torch_alone

F = TypeVar("F", bound=Callable[..., Any])


class deterministic:
    """Run the code inside a block, or a decorated function, under a policy: inference, on CPU and on CUDA devices.

        with deterministic("batch"):
            logits = model(tokens)

    ``policy`` is a Policy, or a scope (``"run"``, ``"batch"``) that stands for ``Policy(Guarantee(scope))``; without one
    (``"configured"``) it is the project's (``policy.configured``: ``[tool.detinfer]`` in pyproject.toml, then the environment). In this
    version ``run`` takes the same paths as ``batch``, and so does ``tp``, under which torch.distributed's sums are refused:
    the parts of a model cut over ranks are added by its own layers (``detinfer record --policy tp``). ``uncovered`` overrides the policy's choice:
    ``"refuse"`` traces every operation and raises RefusedError for one that is neither covered nor allowed, at the
    cost of a few microseconds per operation; ``"trust"`` runs the covered operations on their canonical paths and
    does not look at the others. ``on_call`` (with ``"refuse"``) is called with an operation's name, its arguments and
    the decision, just before it runs. ``families`` replaces detinfer's own covered operations.

    The block's value is an Active: the decisions, the calls, the counts.

    Gradients are off inside: the canonical paths have no backward pass. Blocks nest, and leaving one (also by an
    exception) restores the one around it. Covered operations are overridden for the whole process while any block is
    open, on every thread; tracing and gradients belong to the thread that entered. Enter and leave while no other
    thread runs torch operations, since torch's operator table changes under them.

    Functions made by torch.compile, before the block or inside it, run uncompiled inside.

    Raises UsageError for arguments that make no sense and, at entry, for an engine's environment switch that contradicts
    the policy (``policy.switches``), and RefusedError at entry when subnormal
    numbers are flushed to zero (``torch.set_flush_denormal``), which changes bits.
    """

    def __init__(
        self,
        policy: Policy | Scope | Literal["configured"] = "configured",
        *,
        uncovered: Literal["refuse", "trust"] | None = None,
        on_call: OnCall | None = None,
        families: Families | None = None,
    ) -> None:
        if policy == "configured":
            policy, _ = configured()
        if isinstance(policy, str):
            policy = Policy(Guarantee(policy))
        if not isinstance(policy, Policy):
            raise UsageError(f"deterministic({policy!r}): a Policy, or a scope: run, batch or tp")
        if uncovered is not None and uncovered != policy.uncovered:
            policy = replace(policy, uncovered=uncovered)
        if on_call is not None and policy.uncovered == "trust":
            raise UsageError("on_call needs uncovered='refuse': without tracing there is nothing to call it with")
        self._policy, self._on_call, self._families = policy, on_call, families
        self._open: list[ExitStack] = []

    def __enter__(self) -> Active:
        check_switches(self._policy)
        families = self._families or own()
        with ExitStack() as stack:
            _check_subnormals()
            stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            torch.set_grad_enabled(False)
            stack.enter_context(_uncompiled())
            trace = None
            modules = ModuleStack()
            if self._policy.uncovered == "refuse":
                trace = Trace(self._policy, families.known, modules.path, self._on_call)
            stack.enter_context(STATE.entering(Entry(self._policy, trace), families, Installed))
            if trace is not None:
                stack.enter_context(modules.watching())
                stack.enter_context(trace)
            self._open.append(stack.pop_all())
        return Active(self._policy, families.known, trace)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.pop().__exit__(kind, error, trace)

    def __call__(self, function: F) -> F:
        """Decorate ``function``: each call runs in a block of its own."""
        for test in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
            if test(function):
                raise UsageError(f"{function.__name__} runs in pieces: use `with deterministic(...)` around its steps")

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with deterministic(self._policy, on_call=self._on_call, families=self._families):
                return function(*args, **kwargs)

        return cast(F, inside)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Functions made by torch.compile run as they were written: compiled kernels pass by the overrides."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(_eager())
            yield
            return
        # Nothing can have been compiled yet, and the import takes seconds: wait until somebody asks for it.
        original = torch.compile
        held: list[object] = []  # the stance, once it is taken

        @functools.wraps(original)
        def first(*args: Any, **kwargs: Any) -> Any:
            compiled = original(*args, **kwargs)  # an outer block's comes first, and ends last
            if not held:
                held.append(stack.enter_context(_eager()))
            return compiled

        torch.compile = first
        try:
            yield
        finally:
            held.append(
                None
            )  # where another thread's block has put its own in front, this one does nothing from now on
            if torch.compile is first:
                torch.compile = original


def _eager() -> AbstractContextManager[object]:
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _check_subnormals() -> None:
    with torch_alone():
        kept = bool(torch.full((1,), _SUBNORMAL, device="cpu") * 1.0) and _workers_keep(torch.get_num_threads())
    if not kept:
        raise RefusedError(
            "subnormal numbers are flushed to zero on this thread or a worker, which changes bits: call "
            "torch.set_flush_denormal(False) before torch starts its threads"
        )


@functools.cache
def _workers_keep(threads: int) -> bool:
    """Whether torch's worker threads keep subnormals; one inherits the flag from the thread that started it."""
    numbers = torch.ones(threads * _GRAIN * 2, device="cpu")
    numbers[::1024] = _SUBNORMAL  # few of them: they are slow
    return bool((numbers * 1.0).all())


_GRAIN = 32768
"""Elements that torch gives to one thread of an elementwise operation."""
_SUBNORMAL = 1e-40
