"""An account of what a policy decides in this process, for whoever starts programs under one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from detinfer.policy.policy import Decision


class Ledger(Protocol):
    """Told of every collective that is decided; ``STATE.ledger`` is the one in use, if any."""

    def note(self, op: str, dtypes: Sequence[torch.dtype], decision: Decision) -> None:
        """``op`` was decided, and runs next unless it is refused."""
