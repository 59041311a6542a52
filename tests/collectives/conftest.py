"""Eight processes for the tests of a file, connected in groups of every size."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:  # `ranks` is imported by name, here and in the processes
    sys.path.append(HERE)

import fibers  # noqa: E402
import ranks as _ranks  # noqa: E402

from detinfer import native  # noqa: E402
from detinfer.collectives import cuda_native  # noqa: E402

SIZES = (1, 2, 3, 4, 5, 6, 7, 8)
STAGING = 4096
"""Small, so that tensors of a few thousand elements go in pieces."""


@pytest.fixture(scope="session", autouse=True)
def server() -> Iterator[None]:
    """The server of processes starts with what it needs to import this project and ``ranks``."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def fibers_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GPU library built for the CPU, once for all files of tests that run it."""
    return fibers.library(tmp_path_factory.mktemp("fibers"))


@pytest.fixture(scope="module")
def on_fibers(fibers_library: Path) -> Iterator[None]:
    """GPU communicators run on the CPU in this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.GPU_LIBRARY_VARIABLE, str(fibers_library))
        for cached in (native._open_gpu, cuda_native.library):
            cached.cache_clear()
        yield
    for cached in (native._open_gpu, cuda_native.library):
        cached.cache_clear()


@pytest.fixture(scope="module")
def group() -> Iterator[_ranks.Ranks]:
    """Processes 0 to n - 1 hold a communicator named ``n`` for each n of SIZES."""
    found = _ranks.Ranks(max(SIZES))
    try:
        for size in SIZES:
            assert found.connect(size, str(size), timeout=100.0, staging=STAGING) == [None] * size
        yield found
    finally:
        found.close()
