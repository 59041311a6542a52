"""The GPU library's collectives built for the CPU (tests/native/fibers), and ranks that are threads of this process."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detinfer.collectives import cuda_native as gpu
from detinfer.collectives.cuda import CudaCommunicator
from detinfer.collectives.cuda_native import Geometry
from detinfer.collectives.cuda_paths import shipped

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests/native/fibers"
SOURCES = ("communicator_gpu", "all_reduce", "all_gather", "all_reduce_rms_norm")
LAUNCH = "kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);"
# What a GPU's compiler and processor do by themselves: a launch, room in shared memory, and that a thread which polls
# does not keep the others from running. The kernels are built as they are.
CHANGES = {
    "platform.h": (
        (LAUNCH, "fibers::launch(kernel, group, blocks, threads, shared_bytes, arguments...);"),
        ("int /*group*/, int blocks", "int group, int blocks"),
        ("peek(const uint32_t* count) { return", "peek(const uint32_t* count) { fibers::spin(); return"),
        ("bool* can) {  // see launch_groups()\n  *can = false;", "bool* can) {\n  *can = true;"),
        ("*groups = 0;", "*groups = 1 << 20;"),
        ("(void)shared_bytes;", "if (fibers::set_shared((const void*)kernel, shared_bytes)) return hipInvalid;"),
    ),
    "gpu/link.h": (("if ((++turns_ & 1023u) == 0)", "fibers::spin();\n    if ((++turns_ & 1023u) == 0)"),),
    "all_reduce_rms_norm.cu": (
        ("extern __shared__ __align__(16) char room[];", "char* room = fibers::room();"),
        ("__shared__ alignas(16) float", "alignas(16) __shared__ float"),
    ),
}
KERNEL = re.compile(r"(__launch_bounds__\(([^()]*)\)\s+\w+\([^()]*\) \{\n)")
"""A kernel's beginning: what it says of threads in a block is held against every launch, as a GPU does."""
KERNELS = {"gpu/blanks.h": 2, "gpu/packets.h": 1, "gpu/tiles.h": 2, "gpu/two_shot.h": 1, "all_reduce_rms_norm.cu": 3}
SMALL = Geometry(
    push_channels=16, push_threads=256, tile_channels=6, tile_bytes=2048, part_bytes=8192, least_tile_bytes=512
)
"""Few blocks and small tiles, so that rings go round."""


def library(folder: Path) -> Path:
    """The library for two and three ranks, built in ``folder``; a skip where this machine cannot."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("fibers change places in x86-64 assembly")
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for name, changes in CHANGES.items():
        text = (csrc / name).read_text()
        for old, new in changes:
            assert old in text, f"csrc/{name} has changed: {old}"
            text = text.replace(old, new)
        if name == "platform.h":
            begin = text.index("#else  // groups of one block: never called")
            end = text.index("#endif", begin)
            text = text[:begin] + "#else\n" + (HERE / "groups.h").read_text() + text[end:]
        (csrc / name).write_text(text)
    for name, kernels in KERNELS.items():
        text, found = KERNEL.subn(r"\1  if (fibers::over_bounds(\2)) return;\n", (csrc / name).read_text())
        assert found == kernels, f"csrc/{name} has {found} kernels with bounds"
        (csrc / name).write_text(text)
    flags = [compiler, "-std=c++17", "-O1", "-fPIC", "-w", "-pthread", "-ffp-contract=off", f"-I{HERE}"]
    flags += ["-D__HIP__", "-D__HIPCC__", "-DDETINFER_RANKS_BUILT=3"]
    built = folder / "libfibers.so"
    objects = []
    for source in (HERE / "fibers.cpp", *(csrc / f"{name}.cu" for name in SOURCES)):
        objects.append(folder / f"{source.stem}.o")
        command = [*flags, "-c", "-x", "c++", str(source), "-o", str(objects[-1])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", built], check=True)
    return built


def tensor_of(bits: Any, dtype: str, layout: str = "dense") -> torch.Tensor:
    """The tensor of these stored bits; ``offset``: it starts one element into another."""
    bits = np.ascontiguousarray(bits)
    flat = torch.from_numpy(bits.copy().reshape(-1).view(np.uint8)).view(getattr(torch, dtype))
    if layout == "offset":
        room = torch.empty(flat.numel() + 1, dtype=flat.dtype)
        room[1:] = flat
        flat = room[1:]
    return flat.reshape(bits.shape)


def same(found: torch.Tensor, expected: Any) -> bool:
    """Whether a tensor has these stored bits."""
    return (
        found.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == np.ascontiguousarray(expected).tobytes()
    )


class Ranks:
    """Communicators of ranks whose GPUs are threads; ``run`` calls all of them at once."""

    def __init__(self, size: int, geometry: Geometry = SMALL, timeout: float = 60.0, first_sequence: int = 0) -> None:
        configs = [geometry.config(rank, size, timeout, first_sequence) for rank in range(size)]
        self.size = size
        self.buffers = [gpu.create_buffer(config) for config in configs]
        self.handles = [gpu.create(config, self.buffers) for config in configs]
        paths = shipped(size).paths
        self.ranks = [
            CudaCommunicator(handle, config, torch.device("cpu"), paths, (), own)
            for handle, config, own in zip(self.handles, configs, self.buffers, strict=True)
        ]
        for rank in self.ranks:
            rank._index = -1  # a tensor of the CPU says so
            rank._stream = lambda index: 0

    def run(self, call: Callable[[CudaCommunicator], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """``call`` by all ranks, or by some, each in a thread; raises what was raised, or what has failed on the device."""
        found: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                found[rank] = call(self.ranks[rank])
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=one, args=(rank,)) for rank in (range(self.size) if ranks is None else ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        for rank in self.ranks:
            rank.check()
        return found

    def close(self) -> None:
        """Free what they have."""
        for handle in self.handles:
            gpu.check(gpu.library().detinfer_gpu_destroy(handle))
        for buffer in self.buffers:
            gpu.free_buffer(buffer)
