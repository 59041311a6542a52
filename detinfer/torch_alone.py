"""Torch's own kernels in the middle of a policy: where proofs run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock, get_ident
from typing import Any

import torch


class _Alone:
    """Which thread is inside ``torch_alone``: process-wide, as the overrides that ask are."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.thread: int | None = None

    def here(self) -> bool:
        """Whether the calling thread is inside."""
        return self.thread is not None and self.thread == get_ident()


ALONE = _Alone()


@contextmanager
def torch_alone() -> Iterator[None]:
    """Inside, this thread's torch calls reach torch's own kernels: no override, mode, autocast or gradient.

    A proof runs here, so that it cannot call what it proves, and so that a default device or dtype that a model
    set cannot reach it. One thread at a time; a thread that is inside may enter again.
    """
    with ALONE.lock:
        before, ALONE.thread = ALONE.thread, get_ident()
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with (
                torch._C._DisableTorchDispatch(),
                torch._C.DisableTorchFunction(),
                torch.autocast("cpu", enabled=False),
                _plain_cuda(),
                torch.no_grad(),
            ):
                yield
        finally:
            torch.set_default_dtype(dtype)
            ALONE.thread = before


def _plain_cuda() -> AbstractContextManager[Any]:
    """No autocast on GPUs, where this process uses any: the switch warns where there is none."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return nullcontext()
    return torch.autocast("cuda", enabled=False)
