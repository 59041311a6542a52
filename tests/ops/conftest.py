"""What the tests of the families share: instruction sets, threads, and inputs that overflow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from detinfer import native

LEVELS = ("baseline", "avx2", "avx512")


@pytest.fixture
def overflow_is_expected() -> Iterator[None]:
    """numpy warns of overflow and NaN by default; here they are inputs."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU has."""
    state = native.load()
    assert isinstance(state, native.Loaded), state
    if request.param not in state.levels:
        pytest.skip(f"this CPU or build has no {request.param}")
    with native.hold_isa(request.param):
        yield request.param


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread, then two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def capability_9() -> None:
    """For tests of ``wide``, which runs on GPUs of compute capability 9 alone."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    if (major := torch.cuda.get_device_capability()[0]) != 9:
        pytest.skip(f"wide runs on compute capability 9, and this GPU has {major}")
