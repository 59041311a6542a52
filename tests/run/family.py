"""A program for ``torchrun``: each worker, a child of its own program and a forked one try a product over ranks.

``python family.py FOLDER``: every process that was refused writes its id and its kind to a file there. None fails.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def attempt(kind: str, **options: Any) -> None:
    dist.init_process_group("gloo", **options)
    x = torch.ones(4)
    dist.all_reduce(x)
    try:
        dist.all_reduce(x, op=dist.ReduceOp.PRODUCT)
    except Exception as error:  # a program that goes on whatever happens
        (Path(sys.argv[1]) / f"{kind}-{os.getpid()}").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


def alone(kind: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    with tempfile.NamedTemporaryFile() as store:
        attempt(kind, init_method=f"file://{store.name}-{os.getpid()}", rank=0, world_size=1)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        alone("grandchild")
    else:
        forked = multiprocessing.get_context("fork").Process(target=alone, args=("forked",))
        forked.start()
        forked.join()
        subprocess.run([sys.executable, __file__, sys.argv[1], "grandchild"], check=True)
        attempt("worker")
