"""The GPU library's C functions and structures (csrc/communicator_gpu.h, csrc/gpu/link.h) through ctypes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from detinfer import native
from detinfer.bits import dtype_name
from detinfer.errors import NativeError

COLLECTIVES = {"all_reduce": 0, "reduce_scatter": 1, "all_gather": 2, "all_reduce_rms_norm": 3}
PATHS = {"push": 0, "push_tiles": 1, "pull": 2, "two_shot": 3}
FAULTS = {1: "timeout", 2: "mismatch", 3: "announced mismatch"}


class Config(ctypes.Structure):
    """GpuConfig: the geometry of a communicator, the same on every rank but for ``rank``."""

    _fields_ = (
        ("rank", ctypes.c_int32),
        ("ranks", ctypes.c_int32),
        ("push_channels", ctypes.c_int32),
        ("push_bytes", ctypes.c_int32),
        ("push_threads", ctypes.c_int32),
        ("tile_channels", ctypes.c_int32),
        ("tile_bytes", ctypes.c_int32),
        ("part_bytes", ctypes.c_int32),
        ("least_tile_bytes", ctypes.c_int32),
        ("overlap", ctypes.c_int32),
        ("first_sequence", ctypes.c_uint32),
        ("tile_threads", ctypes.c_int32),
        ("row_blocks", ctypes.c_int32),
        ("time_limit_s", ctypes.c_double),
    )


class Call(ctypes.Structure):
    """GpuCall: one collective."""

    _fields_ = (
        ("collective", ctypes.c_int32),
        ("path", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("op", ctypes.c_int32),
        ("order", ctypes.c_int32),
        ("weight_dtype", ctypes.c_int32),
        ("weight_mode", ctypes.c_int32),
        ("residual_mode", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("tile_bytes", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("in_", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("residual_out", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )


class Fault(ctypes.Structure):
    """Fault: the first wait that failed."""

    _fields_ = (
        ("code", ctypes.c_uint32),
        ("peer", ctypes.c_uint32),
        ("sequence", ctypes.c_uint32),
        ("channel", ctypes.c_uint32),
        ("expected", ctypes.c_uint32),
        ("found", ctypes.c_uint32),
        ("call", ctypes.c_uint64),
        ("theirs", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Geometry:
    """How much memory a communicator has and how its kernels are cut: speed, never bits.

    ``push_channels`` blocks of ``push_threads`` threads push at most ``push_bytes`` each; ``tile_channels`` blocks move
    tiles of ``least_tile_bytes`` to ``tile_bytes`` (``push_tiles``, ``pull``) or ``part_bytes`` over all ranks
    (``two_shot``). ``row_blocks`` blocks at most, 1, 2, 4 or 8, share a row of ``all_reduce_rms_norm`` by ``push``, where
    the GPU can (compute capability 9.0). ``overlap``: a kernel is set up while the one before it still runs.
    """

    push_channels: int = 128
    push_bytes: int = 16384
    push_threads: int = 512
    tile_channels: int = 264
    tile_bytes: int = 16384
    part_bytes: int = 32768
    least_tile_bytes: int = 8192
    tile_threads: int = 512
    row_blocks: int = 8
    overlap: bool = True

    def config(self, rank: int, ranks: int, timeout: float, first_sequence: int = 0) -> Config:
        """The structure that csrc reads."""
        return Config(
            *(rank, ranks, self.push_channels, self.push_bytes, self.push_threads),
            *(self.tile_channels, self.tile_bytes, self.part_bytes, self.least_tile_bytes),
            *(int(self.overlap), first_sequence, self.tile_threads, self.row_blocks, timeout),
        )


@functools.cache
def library() -> Any:
    """The loaded GPU library with its signatures, or NativeError with the reason."""
    handle = native.gpu_library()
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name, arguments in {
        "buffer_create": (pointer, pointer),
        "buffer_free": (pointer,),
        "handle": (pointer, pointer),
        "open": (pointer, pointer),
        "close": (pointer,),
        "reach": (number, number, pointer),
        "create": (pointer, pointer, pointer),
        "destroy": (pointer,),
        "fault": (pointer, pointer),
        "push_holds_rows": (pointer, pointer),
    }.items():
        getattr(handle, f"detinfer_gpu_{name}").argtypes = arguments
    handle.detinfer_gpu_buffer_bytes.argtypes = (pointer,)
    handle.detinfer_gpu_buffer_bytes.restype = ctypes.c_int64
    return handle


def launcher() -> Callable[[ctypes.c_void_p, Any], int]:
    """detinfer_gpu_call, of a communicator and a pointer to a Call, which it does not convert or check: a third of the time."""
    function: Callable[[ctypes.c_void_p, Any], int] = library()["detinfer_gpu_call"]
    return function


def push_holds_rows(comm: int, call: Call) -> bool:
    """Whether path push takes the rows of an all_reduce_rms_norm."""
    return bool(library().detinfer_gpu_push_holds_rows(comm, ctypes.byref(call)))


def check(status: int) -> None:
    """Raise NativeError with the library's last sentence for a status other than 0."""
    if status != 0:
        raise NativeError((library().detinfer_gpu_error() or b"").decode() or f"the GPU library returned {status}")


def mutant() -> int:
    """Number of the fault that this build carries for the tests of the tests; 0 in a build to use."""
    return int(library().detinfer_gpu_mutant())


def create_buffer(config: Config) -> int:
    """Address of a cleared shared buffer on the current device."""
    address = ctypes.c_void_p()
    check(library().detinfer_gpu_buffer_create(ctypes.byref(config), ctypes.byref(address)))
    assert address.value is not None
    return address.value


def free_buffer(address: int) -> None:
    """Give a shared buffer back."""
    check(library().detinfer_gpu_buffer_free(address))


def handle_of(address: int) -> bytes:
    """A shared buffer's handle, for another process of this host."""
    room = ctypes.create_string_buffer(library().detinfer_gpu_handle_bytes())
    check(library().detinfer_gpu_handle(address, room))
    return room.raw


def open_handle(handle: bytes) -> int:
    """Address of another process's shared buffer."""
    address = ctypes.c_void_p()
    check(library().detinfer_gpu_open(handle, ctypes.byref(address)))
    assert address.value is not None
    return address.value


def close_handle(address: int) -> None:
    """Undo open_handle."""
    check(library().detinfer_gpu_close(address))


def can_reach(device: int, peer: int) -> bool:
    """Whether ``device`` can read and write the memory of ``peer``; both as this process counts them."""
    can = ctypes.c_int()
    check(library().detinfer_gpu_reach(device, peer, ctypes.byref(can)))
    return bool(can.value)


def create(config: Config, buffers: Sequence[int]) -> int:
    """A communicator on the current device over the ranks' buffers; every kernel is loaded when this returns."""
    comm = ctypes.c_void_p()
    places = (ctypes.c_void_p * len(buffers))(*buffers)
    check(library().detinfer_gpu_create(ctypes.byref(config), places, ctypes.byref(comm)))
    assert comm.value is not None
    return comm.value


def destroy(comm: int) -> None:
    """Free a communicator, of which no kernel runs any more; not its buffers."""
    check(library().detinfer_gpu_destroy(comm))


def fault_of(comm: int) -> Fault:
    """What has failed; code 0: nothing. Waits for nothing."""
    fault = Fault()
    check(library().detinfer_gpu_fault(comm, ctypes.byref(fault)))
    return fault


def describe(call: int) -> str:
    """A fault's ``call`` or ``theirs`` in words: ``all_reduce of 4096 x bfloat16 by push``."""
    what = next((name for name, code in COLLECTIVES.items() if code == call & 0xF), "a collective")
    path = next((name for name, code in PATHS.items() if code == call >> 4 & 0xF), "another path")
    dtype = next((dtype_name(d) for d, code in native.DTYPES.items() if code == call >> 8 & 0xFF), "elements")
    return f"{what} of {call >> 16}{' bytes' if what == 'all_gather' else f' x {dtype}'} by {path}"


def _public_stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)
"""The current stream of a GPU, by its number, as the runtime knows it. Inductor's own way, where this torch has it: a tenth
of the public function's time."""
