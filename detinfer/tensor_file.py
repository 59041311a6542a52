"""Write safetensors files whose bytes depend on nothing but their content; read them with the safetensors package.

The package's own writer is not used: it copies every tensor once more, and with two or more metadata keys its files
change from one save to the next. Here tensors lie in the package's order (wide dtypes first, then by name), there is
at most one metadata key, and the SHA-256 is taken while writing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from detinfer import bits
from detinfer.errors import UnsupportedDtype

METADATA_KEY = "detinfer"

NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's name of each dtype."""


@dataclass(frozen=True)
class Written:
    """Size in bytes and SHA-256 of a written file."""

    size: int
    sha256: str


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: str | None = None) -> Written:
    """Write ``tensors`` and, under the one metadata key, ``metadata``; the file is on the disk when this returns.

    Raises OSError when it cannot be written, UnsupportedDtype for a dtype that the format has no name for.
    """
    kinds: dict[str, tuple[torch.dtype, list[int]]] = {}
    for name, tensor in tensors.items():
        check_dtype(tensor.dtype, name)
        kinds[name] = tensor.dtype, list(tensor.shape)
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": {METADATA_KEY: metadata}}
    end = 0
    for name in order:
        dtype, shape = kinds[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    head += b" " * (-len(head) % 8)  # the data begins at a multiple of 8, as the format asks
    head = len(head).to_bytes(8, "little") + head
    whole = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for name in order:  # one at a time: the mapping may read them from a disk
            part = bits.as_memory(tensors[name])
            whole.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return Written(len(head) + end, whole.hexdigest())


def check_dtype(dtype: torch.dtype, what: str) -> None:
    """UnsupportedDtype, which names ``what``, for a dtype that the format has no name for."""
    if dtype not in NAMES:
        raise UnsupportedDtype(f"{what}: a tensor file cannot hold {bits.dtype_name(dtype)}")


def reader(path: Path) -> Any:
    """The safetensors package's lazy reader of a file; ValueError when it is no whole safetensors file.

    Its tensors may lie in the mapped file, at any address: clone what is to be computed with.
    """
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(str(error)) from error
