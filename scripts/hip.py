"""Compile the GPU library's device code for AMD's gfx942 and gfx950, and look for the instructions that order memory.

    python scripts/hip.py [FOLDER]

FOLDER holds the tools, which are pip packages (1.2 GB unpacked): $DETINFER_HIP_TOOLS, else build/hip; they are installed
there if they are not. Needs no GPU and no ROCm, and runs nothing: it shows that the sources compile, and that waits
acquire and signals release.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
CSRC = CHECKOUT / "csrc"
TOOLS = ("ziglang==0.17.0", "clang-tidy==22.1.8", "triton==3.7.1")
"""A clang with AMD's backend; the headers of its version; HIP's headers and AMD's device libraries."""
TARGETS = {"gfx942": 9402, "gfx950": 9500}
"""Each with the number by which AMD's device libraries know it."""
NVIDIA_ONLY = {"matmul": "tensor cores", "matmul_fp32": "a part of matmul", "moe": "tensor cores"}
"""Sources that are not compiled for AMD, and why."""
ORDERED = ("all_reduce", "all_gather", "all_reduce_rms_norm")
"""Sources whose kernels wait for other ranks."""
RELEASE, ACQUIRE = "buffer_wbl2 sc0 sc1", "buffer_inv sc0 sc1"
"""What a release and an acquire at the scope of the whole system come to: caches written back, caches discarded."""
VERSION = "HIP_VERSION_MAJOR=7\nHIP_VERSION_MINOR=1\nHIP_VERSION_PATCH=0\n"
# Names in AMD's device libraries that the compiler links: the processor's version, the wave's width, exact arithmetic.
CONTROL = """target triple = "amdgcn-amd-amdhsa"
@__oclc_ISA_version = linkonce_odr protected addrspace(4) constant i32 {isa}
@__oclc_ABI_version = linkonce_odr protected addrspace(4) constant i32 500
@__oclc_wavefrontsize64 = linkonce_odr protected addrspace(4) constant i8 1
@__oclc_wavefrontsize_log2 = linkonce_odr protected addrspace(4) constant i8 6
@__oclc_finite_only_opt = linkonce_odr protected addrspace(4) constant i8 0
@__oclc_unsafe_math_opt = linkonce_odr protected addrspace(4) constant i8 0
@__oclc_correctly_rounded_sqrt32 = linkonce_odr protected addrspace(4) constant i8 1
"""


def tools() -> Path:
    """The folder that is used where none is named."""
    return Path(os.environ.get("DETINFER_HIP_TOOLS") or CHECKOUT / "build/hip").resolve()


def prepared(folder: Path) -> bool:
    """Whether the tools are in it."""
    return all((folder / name).is_dir() for name in ("ziglang", "clang_tidy", "triton"))


def sources() -> list[str]:
    """Every source of device code that is meant for AMD as well."""
    return [path.stem for path in sorted(CSRC.glob("*.cu")) if path.stem not in NVIDIA_ONLY]


class Compiler:
    """The tools, set up for a target in a folder of its own."""

    def __init__(self, folder: Path, work: Path, target: str) -> None:
        self.zig, self.amd = folder / "ziglang/zig", folder / "triton/backends/amd"
        self.headers, self.work, self.target = folder / "clang_tidy/data/lib/clang/22", work, target
        (work / "rocm/bin").mkdir(parents=True)
        (work / "rocm/share/hip").mkdir(parents=True)
        for name in ("bin/.hipVersion", "share/hip/version"):
            (work / "rocm" / name).write_text(VERSION)
        (work / "rocm/include").symlink_to(self.amd / "include")
        (work / "control.ll").write_text(CONTROL.format(isa=TARGETS[target]))
        command = [self.zig, "clang", "--target=amdgcn-amd-amdhsa", "-nogpulib", "-x", "ir", "-c", "-emit-llvm"]
        subprocess.run([*command, work / "control.ll", "-o", work / "control.bc"], check=True)

    def assembly(self, source: str) -> tuple[str, str]:
        """(disassembly, what the compiler said) of a source; the first is empty where it does not compile."""
        out = self.work / f"{source}.s"
        command: list[str | Path] = [self.zig, "clang", "-x", "hip", "-resource-dir", self.headers]
        command += [f"--rocm-path={self.work / 'rocm'}", f"--offload-arch={self.target}", "-nogpulib"]
        command += ["--cuda-device-only", "-include", "__clang_hip_runtime_wrapper.h", "-isystem", self.amd / "include"]
        # Two ranks: what the others are made of, in a seventh of the time.
        command += ["-O3", "-std=c++17", "-ffp-contract=off", "-DDETINFER_RANKS_BUILT=2"]
        for library in (self.amd / "lib/ocml.bc", self.amd / "lib/ockl.bc", self.work / "control.bc"):
            command += ["-Xclang", "-mlink-builtin-bitcode", "-Xclang", library]
        done = subprocess.run(
            [*command, "-S", CSRC / f"{source}.cu", "-o", out], check=False, capture_output=True, text=True
        )
        return out.read_text() if done.returncode == 0 else "", done.stderr


def wrong(source: str, assembly: str) -> str | None:
    """What is wrong with a source's disassembly; None where nothing is."""
    if not assembly:
        return "does not compile"
    missing = [word for word in (RELEASE, ACQUIRE) if source in ORDERED and word not in assembly]
    return f"has no {' and no '.join(missing)}: a wait or a signal of it orders nothing" if missing else None


def check(folder: Path) -> int:
    """Compile everything; the number of sources that are wrong, each with a line."""
    start = time.monotonic()
    failed = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        compilers = []
        for target in TARGETS:
            (Path(name) / target).mkdir()
            compilers.append(Compiler(folder, Path(name) / target, target))
        jobs = [(compiler, source) for compiler in compilers for source in sources()]
        for (compiler, source), (text, said) in zip(
            jobs, pool.map(lambda job: job[0].assembly(job[1]), jobs), strict=True
        ):
            problem = wrong(source, text)
            failed += problem is not None
            counts = f", {text.count(RELEASE)} releases, {text.count(ACQUIRE)} acquires" if source in ORDERED else ""
            print(f"{compiler.target} {source}: {problem or 'good' + counts}", flush=True)
            if not text:
                print(said[:2000])
    left_out = ", ".join(f"{name} ({why})" for name, why in NVIDIA_ONLY.items())
    print(
        f"{len(jobs) - failed} of {len(jobs)} good in {time.monotonic() - start:.0f} s; not meant for AMD: {left_out}"
    )
    return failed


def main() -> int:
    """0 where everything is good."""
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else tools()
    if not prepared(folder):
        print(f"installing {', '.join(TOOLS)} in {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *TOOLS]
        if subprocess.run(pip, check=False).returncode != 0:
            sys.exit("the installation failed; pip's lines above say why")
    return int(check(folder) > 0)


if __name__ == "__main__":
    sys.exit(main())
