"""Everything that a policy puts into torch's operator table: covered operations and collectives."""

from __future__ import annotations

from typing import Any

from torch import distributed

from detinfer.policy.families import Families
from detinfer.policy.overrides import Overrides


class Installed:
    """Overrides for every kind of device and those of collectives, until ``remove``."""

    def __init__(self, families: Families) -> None:
        self.families = families
        self._parts: list[Any] = []
        try:
            self._parts += map(Overrides, (families, *families.elsewhere.values()))
            if distributed.is_available():
                from detinfer.policy.distributed import Distributed

                self._parts.append(Distributed(families.known))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take all of them out."""
        for part in reversed(self._parts):
            part.remove()
