"""How a case of the portable vectors is called between GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from detinfer.goldens.vectors.case import Case, number

GOLDENS = Path(__file__).parents[2] / "goldens"


def called(
    comm: Any, operation: str, case: Case, parts: list[torch.Tensor], shared: dict[str, torch.Tensor], path: str
) -> dict[str, torch.Tensor]:
    """A rank's outputs of a case by their names, its tensors where the communicator wants them."""
    own, how = parts[comm.rank], case.arguments
    if operation == "all_reduce":
        return {"out": comm.all_reduce(own, op=how["op"], order=how["order"], path=path)}
    if operation == "reduce_scatter":
        return {f"rank{comm.rank}": comm.reduce_scatter(own, dim=how["dim"], path=path)}
    norm, total = comm.all_reduce_rms_norm(
        own,
        shared["residual"],
        shared["weight"],
        number(how["eps"]),
        mode=how["mode"],
        weight_mode=how["weight_mode"],
        path=path,
    )
    return {"norm": norm, "residual_out": total}
