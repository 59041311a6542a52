"""Give every rank what each of them has: any value that pickles, through the communicator's shared memory.

The only place where anything is unpickled, and the bytes come from a process of the same launch and user, over memory
without a name that nobody else can open. No file and no golden is ever read this way.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch

from detinfer.collectives.communicator import Communicator


def exchange(communicator: Communicator, value: Any, first: bool) -> list[Any]:
    """Every rank's ``value``, by rank; with ``first`` only rank 0 unpacks them and the others get an empty list."""
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    lengths = communicator.all_gather(torch.tensor([len(data)]))
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data
    everyone = communicator.all_gather(padded).view(communicator.size, longest)
    if first and communicator.rank > 0:
        return []
    return [
        pickle.loads(row[:length].numpy().tobytes()) for row, length in zip(everyone, lengths.tolist(), strict=True)
    ]
