"""Everything that a policy puts into torch's operator table and into transformers, and takes out again."""

from __future__ import annotations

from typing import Any

from torch import distributed

from detinfer.policy.families import Families
from detinfer.policy.hooks import Hooks
from detinfer.policy.overrides import Overrides
from detinfer.policy.printing import Printing


class Installed:
    """Overrides for every kind of device, those of collectives and the hooks, until ``remove``."""

    def __init__(self, families: Families) -> None:
        self.families = families
        self._parts: list[Any] = []
        try:
            self._parts += map(Overrides, (families, *families.elsewhere.values()))
            self._parts += [Hooks(), Printing()]
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
