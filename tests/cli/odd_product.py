"""detinfer's command line as a rank, for torchrun: ``FAULT`` names a row-parallel layer of which rank 2 has a wrong weight."""

from __future__ import annotations

import os
import sys
from typing import Any

from detinfer import cli
from detinfer.models import row_parallel


def main() -> int:
    keep, fault = row_parallel.keep, os.environ["FAULT"]

    def planted(spec: str, module: Any, ranks: Any, asked: int | None = None) -> None:
        keep(spec, module, ranks, asked)
        if ranks.rank == 2:
            forward = module.get_submodule(fault).forward
            (forward._weights[0] if hasattr(forward, "_weights") else forward._down.T)[0, 0] += 1

    row_parallel.keep = planted
    return cli.run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
