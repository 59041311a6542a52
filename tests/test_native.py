"""The native library and the Python side must agree on every struct that passes between them."""

from __future__ import annotations

import pytest

from detinfer import native
from detinfer.errors import NativeError, UsageError


@pytest.mark.parametrize("family", ["matmul", "attention", "elementwise", "rows"])
def test_arguments_of_another_size_are_refused(family: str) -> None:
    with pytest.raises(NativeError, match=rf"the arguments of {family} have \d+ bytes, this detinfer's 3: reinstall"):
        native.entry(family, 3)


def test_the_instruction_set_in_force_is_the_librarys_own() -> None:
    state = native.load()
    assert isinstance(state, native.Loaded)
    before = native.isa()
    for level in state.levels:
        with native.hold_isa(level):
            assert native.isa() == level
            assert native.current() == native.library().detinfer_cpu_current()
    assert native.isa() == before
    with (
        pytest.raises(UsageError, match="instruction set 'sse9': this CPU and build have baseline"),
        native.hold_isa("sse9"),
    ):
        pass
