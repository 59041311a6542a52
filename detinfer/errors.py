"""Every error that detinfer raises on purpose, each with the exit code of the command that meets it.

DetinferError                 3  internal, unless a subclass says otherwise
├── UsageError                2  the call cannot be understood: an option, a name, a value
│   ├── TargetError           2  the target to record or verify cannot be loaded or run
│   ├── UnsupportedDtype      2  a dtype that the contract has no order for
│   ├── DoubleReduceError     2  a layer's sum over ranks would be reduced twice
│   ├── UnreducedError        2  a rank's part of a sum is used as if it were the sum
│   └── RankMismatch          2  the ranks of a group called a collective with different arguments
├── Diverged                  1  bits differ
├── GoldenError               4  a golden is missing, corrupt, stale or of another model
├── Vacuous                   5  nothing could have failed
├── InfrastructureError       6  a process, server or disk failed
│   └── PeerError             6  a rank of a group died, left or did not arrive
├── NativeError               3  the native library is missing or refused a call
└── RefusedError              2  the policy refuses an operation
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

EXIT_SAME = 0
EXIT_DIVERGED = 1
EXIT_USAGE = 2
EXIT_INTERNAL = 3
EXIT_GOLDEN = 4
EXIT_VACUOUS = 5
EXIT_INFRASTRUCTURE = 6
EXIT_INTERRUPTED = 130


class DetinferError(Exception):
    """Base of all: the message says what happened, where, and what to do."""

    exit_code: ClassVar[int] = EXIT_INTERNAL


class UsageError(DetinferError):
    """The call cannot be understood."""

    exit_code: ClassVar[int] = EXIT_USAGE


class TargetError(UsageError):
    """The target to record or verify cannot be loaded or run."""


class UnsupportedDtype(UsageError):
    """A dtype that the contract has no order for."""


class DoubleReduceError(UsageError):
    """A layer's sum over ranks is reduced already and would be reduced once more; the message names the layer."""


class UnreducedError(UsageError):
    """A rank's part of a sum over ranks is used as if it were the sum; the message names the layer."""


class RankMismatch(UsageError):
    """The ranks of a group called a collective with different arguments; nothing was exchanged."""


class RefusedError(UsageError):
    """The policy refuses an operation: nothing proved covers it and it is not allowed."""

    heard: ClassVar[Callable[[str], None] | None] = None
    """Called with the message of every refusal of this process, where somebody keeps an account of them."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        if RefusedError.heard is not None:
            RefusedError.heard(message)


class Diverged(DetinferError):
    """Bits differ where the contract says that they must not."""

    exit_code: ClassVar[int] = EXIT_DIVERGED


class GoldenError(DetinferError):
    """A golden is missing, corrupt, stale or of another model."""

    exit_code: ClassVar[int] = EXIT_GOLDEN


class Vacuous(DetinferError):
    """A check that could not have failed."""

    exit_code: ClassVar[int] = EXIT_VACUOUS


class InfrastructureError(DetinferError):
    """A process, server or disk failed; nothing is said about bits."""

    exit_code: ClassVar[int] = EXIT_INFRASTRUCTURE


class PeerError(InfrastructureError):
    """A rank of a group died, left or did not arrive."""


class NativeError(DetinferError):
    """The native library is missing, of another version, or refused a call."""
