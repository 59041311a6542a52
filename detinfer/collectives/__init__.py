"""Collectives in the contract's orders between the ranks of one host.

    with connect(group) as ranks:  # a torch.distributed group, or None for the default one
        total = ranks.all_reduce(partial)

Every path gives the bytes of ``detinfer/reference``, so which one runs may depend on anything.
"""

from detinfer.collectives.communicator import PATHS, Communicator, connect

__all__ = ["PATHS", "Communicator", "connect"]
