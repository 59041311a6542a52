"""The one thing in this package that changes: which policies are in force now.

Library overrides are process-wide, so this is too. Everything else is a value or a memo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any, Protocol

from detinfer.errors import UsageError
from detinfer.policy.ledger import Ledger
from detinfer.policy.policy import Policy

if TYPE_CHECKING:
    from detinfer.policy.trace import Trace


class Installed(Protocol):
    """Overrides in torch's operator table."""

    families: Any

    def remove(self) -> None:
        """Take them out."""


@dataclass(eq=False)
class Entry:
    """A policy in force: entered by ``thread``; ``trace`` is None when nothing is traced."""

    policy: Policy
    trace: Trace | None
    thread: int = field(default_factory=get_ident)


class State:
    """Policies in force in the order in which they were entered, and the overrides they share."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._entries: list[Entry] = []
        self._installed: Installed | None = None
        self.ledger: Ledger | None = None
        """Told of every collective, where somebody keeps an account."""

    def policy(self) -> Policy:
        """The policy that answers on the calling thread: its own innermost one, else the process's last."""
        entry = self.innermost() or (self._entries[-1] if self._entries else None)
        return Policy() if entry is None else entry.policy

    def trace(self) -> Trace | None:
        """The tracing pass of the calling thread's innermost policy."""
        entry = self.innermost()
        return None if entry is None else entry.trace

    def innermost(self) -> Entry | None:
        """The calling thread's own innermost entry."""
        thread = get_ident()
        for entry in reversed(self._entries):  # a loop: a generator takes a microsecond
            if entry.thread == thread:
                return entry
        return None

    @contextmanager
    def entering(self, entry: Entry, families: Any, install: Callable[[Any], Installed]) -> Iterator[None]:
        """``entry`` is in force inside this block: installs on the first entry, removes on the last exit."""
        with self._lock:
            if self._installed is None:
                self._installed = install(families)
            elif self._installed.families is not families:
                raise UsageError("another policy is in force with other families: leave it first")
            outer = self.innermost()
            self._entries.append(entry)
        if outer is not None and outer.trace is not None:
            outer.trace.suspended += 1
        try:
            yield
        finally:
            if outer is not None and outer.trace is not None:
                outer.trace.suspended -= 1
            with self._lock:
                self._entries.remove(entry)
                if not self._entries and self._installed is not None:
                    installed, self._installed = self._installed, None
                    installed.remove()


STATE = State()
