"""Everything that needs a GPU, in one command: builds the GPU library, runs the tests, the stress and the benchmark.

    python scripts/gpu.py                    # build, tests marked gpu, 2,000 iterations of 13 shapes, benchmark
    python scripts/gpu.py --mutants          # builds with one planted fault each, and what the stress says of them
    python scripts/gpu.py --hip FOLDER       # compile the device code for AMD; FOLDER holds ziglang 0.17.0, clang-tidy
                                             # 22.1.8 and triton 3.7.1, unpacked (pip install --target FOLDER)

Needs nvcc and torch with CUDA, but for --hip, which needs no GPU. What it builds is under build/gpu.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
CSRC = CHECKOUT / "csrc"
SOURCES = ("communicator_gpu", "all_reduce", "all_gather", "all_reduce_rms_norm")
MUTANTS = (1, 2, 4, 5, 6)
TESTS = ("all_reduce", "processes", "protocol")
# Module names of AMD's device libraries that the compiler links: the processor's version and the wave's width.
CONTROL = """target triple = "amdgcn-amd-amdhsa"
@__oclc_ISA_version = linkonce_odr protected addrspace(4) constant i32 {isa}
@__oclc_ABI_version = linkonce_odr protected addrspace(4) constant i32 500
@__oclc_wavefrontsize64 = linkonce_odr protected addrspace(4) constant i8 1
@__oclc_wavefrontsize_log2 = linkonce_odr protected addrspace(4) constant i8 6
@__oclc_finite_only_opt = linkonce_odr protected addrspace(4) constant i8 0
@__oclc_unsafe_math_opt = linkonce_odr protected addrspace(4) constant i8 0
@__oclc_correctly_rounded_sqrt32 = linkonce_odr protected addrspace(4) constant i8 1
"""


def run(command: list[str], **variables: str) -> int:
    """Run a command in the checkout, its output as it comes; its exit status."""
    print("$", " ".join(command), flush=True)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), **variables}
    return subprocess.run(command, cwd=CHECKOUT, env=environment, check=False).returncode


def build(folder: Path, mutant: int = 0) -> Path:
    """The GPU library for the architecture 90, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = ["nvcc", "-O3", "-std=c++17", "-arch=sm_90", "-fmad=false", "-cudart", "static", "--split-compile=0"]
    nvcc += [f"-DDETINFER_MUTANT={mutant}", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"]

    def compile_one(name: str) -> int:
        return run([*nvcc, "-c", f"csrc/{name}.cu", "-o", str(folder / f"{name}.o")])

    with ThreadPoolExecutor() as pool:
        if any(pool.map(compile_one, SOURCES)):
            raise SystemExit("the GPU library does not compile")
    library = folder / "libdetinfer_gpu.so"
    if run([*nvcc, "-shared", *(str(folder / f"{name}.o") for name in SOURCES), "-o", str(library)]):
        raise SystemExit("the GPU library does not link")
    return library


def stress(library: Path, iterations: int, *more: str) -> int:
    """13 shapes between two GPUs."""
    program = "tests/collectives/cuda_stress.py"
    return run([sys.executable, program, "2", str(iterations), *more], DETINFER_GPU_LIBRARY=str(library))


def hip(site: Path) -> int:
    """Compile the device code for gfx942 and gfx950 and look for the ordering instructions; 0 where all is there."""
    zig, headers = site / "ziglang/zig", site / "clang_tidy/data/lib/clang/22"
    amd = site / "triton/backends/amd"
    failed = 0
    for target, isa in (("gfx942", 9402), ("gfx950", 9500)):
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            (work / "rocm/bin").mkdir(parents=True)
            (work / "rocm/share/hip").mkdir(parents=True)
            (work / "rocm/share/hip/version").write_text(
                "HIP_VERSION_MAJOR=7\nHIP_VERSION_MINOR=1\nHIP_VERSION_PATCH=0\n"
            )
            version = "HIP_VERSION_MAJOR=7\nHIP_VERSION_MINOR=1\nHIP_VERSION_PATCH=0\n"
            (work / "rocm/bin/.hipVersion").write_text(version)
            (work / "rocm/include").symlink_to(amd / "include")
            (work / "control.ll").write_text(CONTROL.format(isa=isa))
            subprocess.run(
                [
                    *(zig, "clang", "--target=amdgcn-amd-amdhsa", "-nogpulib", "-x", "ir", "-c", "-emit-llvm"),
                    *(work / "control.ll", "-o", work / "control.bc"),
                ],
                check=True,
            )
            linked = [amd / "lib/ocml.bc", amd / "lib/ockl.bc", work / "control.bc"]
            for source in SOURCES:
                assembly = work / f"{source}.s"
                command: list[str | Path] = [zig, "clang", "-x", "hip", "-resource-dir", headers]
                command += [f"--rocm-path={work / 'rocm'}", f"--offload-arch={target}", "-nogpulib"]
                command += [
                    "--cuda-device-only",
                    "-include",
                    "__clang_hip_runtime_wrapper.h",
                    "-isystem",
                    amd / "include",
                ]
                command += ["-O3", "-std=c++17", "-ffp-contract=off", "-DDETINFER_TWO_RANKS_ONLY"]
                for library in linked:
                    command += ["-Xclang", "-mlink-builtin-bitcode", "-Xclang", library]
                done = subprocess.run([*command, "-S", CSRC / f"{source}.cu", "-o", assembly], check=False)
                text = assembly.read_text() if done.returncode == 0 else ""
                found = {word: text.count(word) for word in ("buffer_wbl2 sc0 sc1", "buffer_inv sc0 sc1")}
                tiles = source != "communicator_gpu"
                good = done.returncode == 0 and (not tiles or all(found.values()))
                failed += not good
                print(f"{target} {source}: {'good' if good else 'WRONG'}, {found}")
    return int(failed > 0)


def main() -> int:
    """Run what was asked for; 0 where all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", action="store_true")
    parser.add_argument("--hip", type=Path, metavar="FOLDER")
    chosen = parser.parse_args()
    if chosen.hip:
        return hip(chosen.hip.resolve())
    folder = CHECKOUT / "build/gpu"
    if chosen.mutants:
        for mutant in MUTANTS:
            stress(build(folder / f"mutant{mutant}", mutant), 40, "every path")
        return 0
    library = build(folder)
    files = [f"tests/collectives/test_cuda_{name}.py" for name in TESTS]
    failed = run([sys.executable, "-m", "pytest", "-q", *files], DETINFER_GPU_LIBRARY=str(library))
    failed |= stress(library, 2000)
    report = str(folder / "collectives.json")
    bench = [sys.executable, "-m", "detinfer", "bench", "collectives-cuda", "--json", report]
    return failed | run(bench, DETINFER_GPU_LIBRARY=str(library))


if __name__ == "__main__":
    sys.exit(main())
