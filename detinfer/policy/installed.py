"""Everything that a policy puts into torch's operator table: covered operations and collectives."""

from __future__ import annotations

from typing import Any

from torch import distributed

from detinfer.policy.families import Families
from detinfer.policy.overrides import Overrides


class Installed:
    """Both kinds of overrides, until ``remove``."""

    def __init__(self, families: Families) -> None:
        self.families = families
        self._parts: list[Any] = [Overrides(families)]
        if distributed.is_available():
            from detinfer.policy.distributed import Distributed

            try:
                self._parts.append(Distributed(families.known))
            except BaseException:
                self.remove()
                raise

    def remove(self) -> None:
        """Take both out."""
        for part in reversed(self._parts):
            part.remove()
