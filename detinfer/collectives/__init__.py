"""Collectives in the contract's orders between the ranks of one host, on CPU and between GPUs.

    with connect(group) as ranks:  # a torch.distributed group, or None for the default one
        total = ranks.all_reduce(partial)

Every path gives the bytes of ``detinfer/reference``, so which one runs may depend on anything.
"""

from detinfer.collectives.calls import PATHS
from detinfer.collectives.communicator import Communicator
from detinfer.collectives.cuda import CudaCommunicator
from detinfer.collectives.devices import Communicators, connect

__all__ = ["PATHS", "Communicator", "Communicators", "CudaCommunicator", "connect"]
