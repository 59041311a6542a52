"""cuBLASLt through its C interface, held to algorithms that do not split k: the settings of torch are not touched.

The library is the one that torch has loaded. An algorithm is 64 bytes that hold for one version of cuBLASLt; the same
bytes run the same kernel for any number of rows that it supports. No algorithm here gets a workspace.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any, NamedTuple

import torch

from detinfer.errors import NativeError

ALGORITHM_BYTES = 64
"""Size of cublasLtMatmulAlgo_t, which the library documents as opaque and good to store for one of its versions."""

_NAMES = ("libcublasLt.so.13", "libcublasLt.so.12")
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_COMPUTE_32F, _TRANSPOSED = 68, 1
_DESC_TRANSA, _DESC_EPILOGUE, _DESC_BIAS_POINTER = 3, 7, 8
_EPILOGUE_BIAS = 4
_PREFERENCE_WORKSPACE, _PREFERENCE_REDUCTION, _PREFERENCE_ALIGNMENT = 1, 3, (5, 6, 7, 8)
_CONFIG_SPLIT, _CONFIG_REDUCTION = 2, 3
_ZERO, _ONE = ctypes.c_float(0.0), ctypes.c_float(1.0)
_ZERO_AT, _ONE_AT = ctypes.addressof(_ZERO), ctypes.addressof(_ONE)


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint8 * ALGORITHM_BYTES),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Problem(NamedTuple):
    """out [m, n] = x [m, k] times weight [n, k] transposed, + bias; strides of rows in elements, elements contiguous."""

    dtype: torch.dtype
    m: int
    n: int
    k: int
    x_stride: int
    w_stride: int
    bias: int = 0
    """Address of the bias, n elements; 0 for none."""


def _loaded(name: str) -> Any:
    try:
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:  # of another major version
        return None


@functools.cache
def _library() -> Any:
    for name in _NAMES:
        if (found := _loaded(name)) is not None:
            return found
    raise NativeError(f"cuBLASLt: torch has loaded none of {', '.join(_NAMES)}: matrix products run on other paths")


def available() -> bool:
    """Whether torch has loaded a cuBLASLt that this module knows."""
    try:
        return _library() is not None
    except NativeError:
        return False


def version() -> int:
    """cuBLASLt's own version number; 0 where it is not loaded."""
    if not available():
        return 0
    _library().cublasLtGetVersion.restype = ctypes.c_size_t
    return int(_library().cublasLtGetVersion())


def _check(status: int, doing: str) -> None:
    if status:
        raise NativeError(f"cuBLASLt: {doing}: status {status}")


_handles: dict[int, ctypes.c_void_p] = {}


def ready(device: int) -> bool:
    """Whether a product can start on a device: its handle is there, or can be made, since no graph is being captured."""
    return device in _handles or not torch.cuda.is_current_stream_capturing()


def _handle(device: int) -> ctypes.c_void_p:
    if device not in _handles:
        handle = ctypes.c_void_p()
        with torch.cuda.device(device):
            _check(_library().cublasLtCreate(ctypes.byref(handle)), "making a handle")
        _handles[device] = handle
    return _handles[device]


@functools.cache
def _matmul() -> Any:
    run = _library().cublasLtMatmul
    pointer = ctypes.c_void_p
    run.argtypes = (*[pointer] * 14, ctypes.c_size_t, pointer)
    return run


class Product:
    """The descriptors of one problem on one device: made once, run from any thread."""

    def __init__(self, problem: Problem, device: int) -> None:
        self._handle, self._run = _handle(device), _matmul()
        m, n, k = problem.m, problem.n, problem.k
        # Its matrices are column-major: its A is the weight, k x n, taken transposed; its B is x, k x m; its D is n x m.
        self._weight = self._layout(problem.dtype, k, n, problem.w_stride)
        self._x = self._layout(problem.dtype, k, m, problem.x_stride)
        self._out = self._layout(problem.dtype, n, m, n)
        self._operation = ctypes.c_void_p()
        create = _library().cublasLtMatmulDescCreate
        _check(create(ctypes.byref(self._operation), _COMPUTE_32F, _TYPES[torch.float32]), "describing a product")
        self._set(_DESC_TRANSA, ctypes.c_int32(_TRANSPOSED))
        if problem.bias:
            self._set(_DESC_EPILOGUE, ctypes.c_uint32(_EPILOGUE_BIAS))
            self._set(_DESC_BIAS_POINTER, ctypes.c_void_p(problem.bias))

    def __del__(self) -> None:
        """Give the descriptors back."""
        for name, at in (("MatrixLayout", "_weight"), ("MatrixLayout", "_x"), ("MatrixLayout", "_out")):
            if getattr(self, at, None):
                getattr(_library(), f"cublasLt{name}Destroy")(getattr(self, at))
        if getattr(self, "_operation", None):
            _library().cublasLtMatmulDescDestroy(self._operation)

    @staticmethod
    def _layout(dtype: torch.dtype, rows: int, columns: int, stride: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        create = _library().cublasLtMatrixLayoutCreate
        sizes = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride))
        _check(create(ctypes.byref(layout), _TYPES[dtype], *sizes), "describing a matrix")
        return layout

    def _set(self, attribute: int, value: Any) -> None:
        found = _library().cublasLtMatmulDescSetAttribute
        _check(found(self._operation, attribute, ctypes.byref(value), ctypes.sizeof(value)), "describing a product")

    def algorithms(self, most: int = 16) -> list[bytes]:
        """At most ``most`` algorithms that keep k in one piece and need no workspace, the library's choice first."""
        preference = ctypes.c_void_p()
        _check(_library().cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "asking for algorithms")
        try:
            wanted: list[tuple[int, Any]] = [
                (_PREFERENCE_WORKSPACE, ctypes.c_uint64(0)),
                (_PREFERENCE_REDUCTION, ctypes.c_uint32(0)),
            ]
            wanted += [(attribute, ctypes.c_uint32(16)) for attribute in _PREFERENCE_ALIGNMENT]
            for attribute, value in wanted:
                put = _library().cublasLtMatmulPreferenceSetAttribute
                _check(put(preference, attribute, ctypes.byref(value), ctypes.sizeof(value)), "asking for algorithms")
            found, count = (_Heuristic * most)(), ctypes.c_int()
            ask = _library().cublasLtMatmulAlgoGetHeuristic
            operands = (self._weight, self._x, self._out, self._out)
            if ask(self._handle, self._operation, *operands, preference, most, found, ctypes.byref(count)):
                return []
        finally:
            _library().cublasLtMatmulPreferenceDestroy(preference)
        results = [found[i] for i in range(count.value) if found[i].state == 0 and found[i].workspace == 0]
        return [bytes(r.algorithm) for r in results if _whole(bytes(r.algorithm))]

    def run(self, x: int, weight: int, out: int, algorithm: bytes, stream: int) -> None:
        """Start the product of the operands at these addresses; the device of ``stream`` has to be the current one.

        Raises NativeError where the library refuses the algorithm; then nothing was written.
        """
        status = self._run(
            *(self._handle, self._operation, _ONE_AT, weight, self._weight, x, self._x),
            *(_ZERO_AT, out, self._out, out, self._out),
            *(algorithm, None, 0, stream),
        )
        if status:
            raise NativeError(f"cuBLASLt: a product: status {status}")


def _whole(algorithm: bytes) -> bool:
    """Whether an algorithm keeps k in one piece."""
    value, written = ctypes.c_int32(), ctypes.c_size_t()
    get = _library().cublasLtMatmulAlgoConfigGetAttribute
    for attribute, allowed in ((_CONFIG_SPLIT, (0, 1)), (_CONFIG_REDUCTION, (0,))):
        if get(algorithm, attribute, ctypes.byref(value), ctypes.sizeof(value), ctypes.byref(written)):
            return False
        if value.value not in allowed:
            return False
    return True
