"""detinfer's command line as a rank, for torchrun: ``FAULT`` names a module whose result on rank 2 is off by a bit.

With ``LOST`` it is rank 1 that looks up a row that is not there, which ends what its GPU does for the process.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from detinfer import cli
from detinfer.models import tensor_parallel


def main() -> int:
    watch, fault = tensor_parallel.watch, os.environ["FAULT"]

    def off_by_a_bit(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        wrong = output.clone()
        wrong.view(torch.int16)[0, 0, 0] ^= 1
        return wrong

    def lost(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        rows = torch.full((1,), len(output) + 7, device=output.device)
        return output + output.index_select(0, rows)

    def planted(module: Any, ranks: Any) -> None:
        if "LOST" in os.environ:
            if ranks.rank == 1:
                module.get_submodule(fault).register_forward_hook(lost)
        elif fault and ranks.rank == 2:
            module.get_submodule(fault).register_forward_hook(off_by_a_bit)
        watch(module, ranks)

    tensor_parallel.watch = planted
    return cli.run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
