"""Find and load csrc's library: plain C functions over pointers, called through ctypes.

The library is built without torch's headers, so one file serves every torch and Python. It borrows torch's own
threads through ``torch_parallel_for`` (torch/csrc/stable/c/shim.h): a second pool would fight the first for cores.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import detinfer
from detinfer.errors import NativeError, UnsupportedDtype, UsageError

ABI = 3
ISA_VARIABLE = "DETINFER_CPU_ISA"
"""Holds the CPU kernels to an instruction set: ``baseline``, ``avx2``, ``avx512`` or ``avx512_bf16``."""

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""csrc's code of each storage dtype (csrc/platform.h)."""

GPU_ABI = 4
GPU_LIBRARY_VARIABLE = "DETINFER_GPU_LIBRARY"
"""Path of the GPU library to load instead of the installed one: for developing csrc."""

_GPU_FILE = "libdetinfer_gpu.so"
_FILE = {"darwin": "libdetinfer_cpu.dylib", "win32": "detinfer_cpu.dll"}.get(sys.platform, "libdetinfer_cpu.so")


@dataclass(frozen=True)
class Loaded:
    """The library is ready; ``levels`` are the instruction sets that it has and this CPU runs, ascending."""

    path: Path
    levels: tuple[str, ...]


@dataclass(frozen=True)
class NotLoaded:
    """The library is not usable, and why."""

    reason: str


LIBRARY_VARIABLE = "DETINFER_NATIVE_LIBRARY"
"""Path of the library to load instead of the installed one: for developing csrc."""


def _candidates() -> list[Path]:
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        return [Path(chosen)]
    # An editable install has two places: the sources and site-packages, where the build put the library.
    return [Path(place) / "lib" / _FILE for place in detinfer.__path__]


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, Loaded | NotLoaded]:
    tried = _candidates()
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        places = ", ".join(str(p) for p in tried)
        return None, NotLoaded(f"{_FILE} is in none of {places}: install detinfer with pip, which builds it")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, NotLoaded(f"{path} does not load: {error}")
    library.detinfer_error.restype = ctypes.c_char_p
    library.detinfer_cpu_level.restype = ctypes.c_char_p
    library.detinfer_cpu_current.restype = ctypes.c_char_p
    if (found := library.detinfer_abi()) != ABI:
        return None, NotLoaded(f"{path} has ABI {found}, this detinfer needs {ABI}: reinstall detinfer")
    levels: list[str] = []
    while (name := library.detinfer_cpu_level(len(levels))) is not None:
        levels.append(name.decode())
    _lend_threads(library)
    loaded = Loaded(path, tuple(levels))
    held = os.environ.get(ISA_VARIABLE) or None
    if held is not None and held not in levels:
        raise UsageError(f"{ISA_VARIABLE}={held}: this CPU and build have {', '.join(levels)}")
    _select(library, held)
    return library, loaded


_current = b""  # kept on this side: every overridden operation asks for it


def _select(library: ctypes.CDLL, level: str | None) -> None:
    global _current
    library.detinfer_cpu_select(level.encode() if level else None)
    _current = library.detinfer_cpu_current()


def _lend_threads(library: ctypes.CDLL) -> None:
    folder = Path(torch.__file__).parent / "lib"
    path = next((p for p in folder.glob("*torch_cpu.*") if p.suffix in {".so", ".dylib", ".dll"}), None)
    if path is None:
        return  # one thread: slower, the same bits
    host = ctypes.CDLL(str(path))  # already in the process: this only finds its symbols
    try:
        functions = (host.torch_parallel_for, host.torch_get_num_threads)
    except AttributeError:
        return
    library.detinfer_set_threads(*(ctypes.cast(f, ctypes.c_void_p) for f in functions))


def load() -> Loaded | NotLoaded:
    """The library's state, as a value with a reason; loads it on the first call."""
    return _open()[1]


def library() -> ctypes.CDLL:
    """The loaded library, or NativeError with the reason."""
    handle, state = _open()
    if handle is None:
        assert isinstance(state, NotLoaded)
        raise NativeError(state.reason)
    return handle


def check(status: int) -> None:
    """Raise the library's last error if a call returned a status other than 0."""
    if status != 0:
        message = (library().detinfer_error() or b"").decode()
        raise NativeError(message or f"the native library returned status {status}")


def dtype_code(dtype: torch.dtype, where: str) -> int:
    """csrc's code of ``dtype``; UnsupportedDtype names ``where`` for any other than fp32, bf16, fp16."""
    code = DTYPES.get(dtype)
    if code is None:
        raise UnsupportedDtype(f"{where}: {dtype} has no canonical order; use float32, bfloat16 or float16")
    return code


@functools.cache
def entry(family: str, size: int) -> Callable[[bytes], int]:
    """csrc's function of ``family``: takes its packed arguments, returns a status for ``check``.

    ``size`` is the number of bytes in the structs that the caller fills in; NativeError where csrc's are of another
    size, since a library that reads past them crashes.
    """
    handle = library()
    bytes_of = getattr(handle, f"detinfer_cpu_{family}_size", None)
    state = load()
    where = state.path if isinstance(state, Loaded) else _FILE
    if bytes_of is None:
        raise NativeError(f"{where} has no {family}: it is older than this detinfer; reinstall detinfer")
    if (found := bytes_of()) != size:
        raise NativeError(
            f"{where}: the arguments of {family} have {found} bytes, this detinfer's {size}: reinstall detinfer"
        )
    function: Callable[[bytes], int] = getattr(handle, f"detinfer_cpu_{family}")
    return function


def current() -> bytes:
    """Name of the instruction set in use, as csrc has it."""
    if not _current:
        library()
    return _current


def isa() -> str:
    """Name of the instruction set in use."""
    return current().decode()


@contextmanager
def hold_isa(level: str) -> Iterator[None]:
    """Run the CPU kernels at ``level`` inside the block (for the whole process); bits stay the same."""
    before = isa()
    state = load()
    if not isinstance(state, Loaded) or level not in state.levels:
        have = state.levels if isinstance(state, Loaded) else ()
        raise UsageError(f"instruction set {level!r}: this CPU and build have {', '.join(have)}")
    _select(library(), level)
    try:
        yield
    finally:
        _select(library(), before)


@functools.cache
def _open_gpu() -> tuple[ctypes.CDLL | None, Loaded | NotLoaded]:
    chosen = os.environ.get(GPU_LIBRARY_VARIABLE)
    tried = [Path(chosen)] if chosen else [Path(place) / "lib" / _GPU_FILE for place in detinfer.__path__]
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        places = ", ".join(str(p) for p in tried)
        return None, NotLoaded(f"{_GPU_FILE} is in none of {places}: install detinfer where nvcc is on the PATH")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, NotLoaded(f"{path} does not load: {error}")
    if (found := library.detinfer_gpu_abi()) != GPU_ABI:
        return None, NotLoaded(f"{path} has ABI {found}, this detinfer needs {GPU_ABI}: reinstall detinfer")
    library.detinfer_gpu_error.restype = ctypes.c_char_p
    return library, Loaded(path, ("cuda",))


def load_gpu() -> Loaded | NotLoaded:
    """The GPU library's state, as a value with a reason; loads it on the first call. It needs no GPU to load."""
    return _open_gpu()[1]


def gpu_library() -> ctypes.CDLL:
    """The loaded GPU library, or NativeError with the reason."""
    handle, state = _open_gpu()
    if handle is None:
        assert isinstance(state, NotLoaded)
        raise NativeError(state.reason)
    return handle
