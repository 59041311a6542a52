"""What a machine and its libraries are, as far as bits may depend on them.

A golden holds the environment that it was recorded in. Some fields make it *stale* elsewhere: torch and the libraries
under it promise no bits from one version, CPU or setting to the next, so a comparison there would say nothing. What
detinfer itself computes is promised on every CPU, at every instruction set and number of threads: there another
environment excuses nothing, and for portable operations nothing is ever stale.

Host name, paths, time and the number of threads are not here at all.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import detinfer
from detinfer.errors import GoldenError

STALE_REASONS: dict[str, str] = {
    "torch": "torch promises no bits across versions",
    "torch_git": "two builds of one version can hold other kernels",
    "system": "compilers and mathematical libraries differ between operating systems",
    "machine": "another architecture has other vector units",
    "libc": "scalar tails of torch's elementwise loops call the C library's exp, log and their like",
    "cpu": "MKL and oneDNN choose kernels and block sizes by CPU model",
    "cpu_features": "MKL, oneDNN and torch choose kernels by instruction set",
    "cpu_capability": "torch's own vector kernels come in one version per capability",
    "mkl": "fp32 matrix products of torch run in it",
    "onednn": "bf16 and fp16 matrix products of torch run in it",
    "variables": "they hold MKL, oneDNN or the C library to other kernels",
    "flags": "they switch torch to other kernels or other precision",
    "libraries": "a model's own code comes from them",
    "gpu": "another GPU, driver or CUDA library has other kernels",
}
"""The fields that make a golden stale, each with the reason."""

STALE_FIELDS: tuple[str, ...] = tuple(STALE_REASONS)

VARIABLES: tuple[str, ...] = (
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "GLIBC_TUNABLES",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_DISABLE_FAST_MM",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_MKLDNN_MATMUL_MIN_DIM",
    "TORCH_MKLDNN_MATMUL_MIN_SIZE",
)
"""Variables that choose kernels and cannot be read back as a setting. ``ATEN_CPU_CAPABILITY`` is seen in
``cpu_capability`` and ``DETINFER_CPU_ISA`` in ``native``."""

GPU_VARIABLES: tuple[str, ...] = (
    "CUBLASLT_WORKSPACE_SIZE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
)
"""Variables that choose kernels of a GPU's libraries: entries of ``gpu``, so that they excuse nothing on a CPU."""

# x86 flags and ARM features by which some library chooses a kernel.
_FEATURES = re.compile(r"(s?sse|avx|amx|asimd|sve|bmi)[a-z0-9_]*|fma|f16c|gfni|vaes|sme2?|bf16|i8mm|fphp")


@dataclass(frozen=True)
class Environment:
    """One machine, as ``capture`` found it; every value is a string, a list of strings or a map of strings.

    ``native`` is the instruction set that detinfer's own kernels run at; it is kept to be read, like ``python`` and
    ``detinfer``: bits that differ with it are a fault to be found, not a golden gone stale. ``gpu`` is empty for what ran
    on a CPU.
    """

    torch: str
    torch_git: str
    python: str
    system: str
    machine: str
    libc: str
    cpu: str
    cpu_features: tuple[str, ...]
    cpu_capability: str
    mkl: str
    onednn: str
    detinfer: str
    native: str
    variables: dict[str, str]
    flags: dict[str, str]
    libraries: dict[str, str]
    gpu: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, to be read back by ``from_json``; ``gpu`` is left out where it is empty."""
        found = {**asdict(self), "cpu_features": list(self.cpu_features)}
        if not self.gpu:
            del found["gpu"]
        return found

    @classmethod
    def from_json(cls, data: object, where: str = "environment") -> Environment:
        """The environment of a manifest; GoldenError names a key that is unknown, missing or of another type."""
        if not isinstance(data, dict):
            raise GoldenError(f"{where}: expected an object")
        known = {one.name: str(one.type) for one in fields(cls)}
        data = {"gpu": {}, **data}
        for name in sorted(known.keys() ^ data.keys()):
            raise GoldenError(f"{where}: {'missing' if name in known else 'unknown'} key {name!r}")
        for name, kind in known.items():
            if not _is(data[name], kind):
                raise GoldenError(f"{where}: {name} has another type than it should")
        return cls(**{**data, "cpu_features": tuple(data["cpu_features"])})


def _is(value: object, kind: str) -> bool:
    if kind == "str":
        return isinstance(value, str)
    if kind.startswith("tuple"):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)


def differences(recorded: Environment, here: Environment, portable: bool = False) -> tuple[tuple[str, str, str], ...]:
    """(field, recorded value, value here) of each stale field that differs; maps by entry, as ``variables.MKL_CBWR``.

    ``portable`` operations depend on none of them: always empty. A variable, flag or library that one side lacks
    reads as ``unset``.
    """
    if portable:
        return ()
    found: list[tuple[str, str, str]] = []
    for name in STALE_FIELDS:
        a, b = getattr(recorded, name), getattr(here, name)
        if isinstance(a, dict):
            pairs = [(f"{name}.{key}", a.get(key, "unset"), b.get(key, "unset")) for key in sorted(a.keys() | b.keys())]
        else:
            pairs = [(name, " ".join(a), " ".join(b)) if isinstance(a, tuple) else (name, a, b)]
        found += [pair for pair in pairs if pair[1] != pair[2]]
    return tuple(found)


def capture(
    native: str = "none", libraries: Sequence[str] = ("transformers",), device: torch.device | str = "cpu"
) -> Environment:
    """This process and its machine now.

    ``native`` is the instruction set of detinfer's kernels (``native.isa()``; this module may not import upwards).
    ``libraries`` are the packages whose code the recorded model runs, ``device`` is where it runs: ``gpu`` describes a
    CUDA device.
    """
    config = torch.__config__.show()
    return Environment(
        torch=torch.__version__,
        torch_git=str(torch.version.git_version),
        python=platform.python_version(),
        system=platform.system(),
        machine=platform.machine(),
        libc=" ".join(platform.libc_ver()).strip(),
        cpu=_cpu(),
        cpu_features=_cpu_features(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        mkl=_found(r"Math Kernel Library Version (\S+) Build (\d+)", config),
        onednn=_found(r"MKL-DNN v(\S+) \(Git Hash (\w+)\)", config),
        detinfer=detinfer.__version__,
        native=native,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        flags=_flags(),
        libraries={name: version for name in sorted(libraries) if (version := _version(name)) is not None},
        gpu=gpu(device) if torch.device(device).type == "cuda" else {},
    )


def gpu(device: torch.device | str = "cuda") -> dict[str, str]:
    """What a GPU's bits may depend on: the GPU, its driver, the libraries of kernels, variables that choose among them."""
    where = torch.device(device)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if where.index is None else where.index)
    found = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "driver": _driver(),
        "runtime": f"hip {torch.version.hip}" if torch.version.hip else f"cuda {torch.version.cuda}",
        "cublas": _first_version("nvidia-cublas", f"nvidia-cublas-cu{(torch.version.cuda or '').partition('.')[0]}"),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "triton": _first_version("triton", "pytorch-triton", "pytorch-triton-rocm"),
    }
    return found | {name: os.environ[name] for name in GPU_VARIABLES if name in os.environ}


def _driver() -> str:
    """The kernel driver's version, as NVIDIA's management library has it; ``unknown`` without that library."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(80)
        if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))):
            return "unknown"
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return "unknown"
    return text.value.decode(errors="replace")


def _first_version(*packages: str) -> str:
    return next((version for package in packages if (version := _version(package)) is not None), "unknown")


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return " ".join(group for group in match.groups() if group) if match else "none"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """Keys and values of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu() -> str:
    info = _cpuinfo()
    for keys in (("vendor_id", "cpu family", "model"), ("CPU implementer", "CPU architecture", "CPU part")):
        if all(key in info for key in keys):
            return " ".join(f"{key.split()[-1]} {info[key]}" for key in keys)
    return platform.processor() or "unknown"


def _cpu_features() -> tuple[str, ...]:
    info = _cpuinfo()
    listed = (info.get("flags") or info.get("Features") or "").split()
    return tuple(sorted(flag for flag in set(listed) if _FEATURES.fullmatch(flag)))


def _flags() -> dict[str, str]:
    cuda: Any = torch.backends.cuda  # where torch keeps the switches of attention on CPU as well
    smallest = torch.tensor([1], dtype=torch.int32).view(torch.float32)
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "mkldnn": str(torch.backends.mkldnn.enabled),
        "flush_denormal": str(float(smallest * 1.0) == 0.0),
        "sdp_flash": str(cuda.flash_sdp_enabled()),
        "sdp_math": str(cuda.math_sdp_enabled()),
    }
