"""Everything that needs a GPU, in one command: builds the GPU library, runs the tests, the stress and the benchmark.

    python scripts/gpu.py                    # build, tests marked gpu, 2,000 iterations of 13 shapes, benchmark: 2 GPUs
    python scripts/gpu.py --ranks 8          # the same between 8, with a table of paths that is made first
    python scripts/gpu.py --models           # one GPU: tests of operations and policies, a whole model's bytes and times
    python scripts/gpu.py --mutants          # builds with one planted fault each, and what the stress says of them

Needs nvcc and torch with CUDA. What it builds is under build/gpu. The check for AMD is scripts/hip.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
CSRC = CHECKOUT / "csrc"
COLLECTIVES = ("communicator_gpu", "all_reduce", "all_gather", "all_reduce_rms_norm")
SOURCES = tuple(sorted(file.stem for file in CSRC.glob("*.cu")))
MUTANTS = (1, 2, 4, 5, 6, 7, 8)
TESTS = ("all_reduce", "vectors", "processes", "protocol")
MODELS = ("tests", "--ignore=tests/collectives")
"""Every test marked gpu, less those of the collectives, whose kernels have a run of their own."""


def run(command: list[str], **variables: str) -> int:
    """Run a command in the checkout, its output as it comes; its exit status."""
    print("$", " ".join(command), flush=True)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), **variables}
    return subprocess.run(command, cwd=CHECKOUT, env=environment, check=False).returncode


def build(folder: Path, mutant: int = 0, sources: Sequence[str] = COLLECTIVES) -> Path:
    """The GPU library of ``sources`` for the architecture 90, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = ["nvcc", "-O3", "-std=c++17", "-arch=sm_90", "-fmad=false", "-cudart", "static", "--split-compile=0"]
    nvcc += [f"-DDETINFER_MUTANT={mutant}", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"]

    def compile_one(name: str) -> int:
        return run([*nvcc, "-c", f"csrc/{name}.cu", "-o", str(folder / f"{name}.o")])

    with ThreadPoolExecutor() as pool:
        if any(pool.map(compile_one, sources)):
            raise SystemExit("the GPU library does not compile")
    library = folder / "libdetinfer_gpu.so"
    if run([*nvcc, "-shared", *(str(folder / f"{name}.o") for name in sources), "-o", str(library)]):
        raise SystemExit("the GPU library does not link")
    return library


def stress(ranks: int, iterations: int, *more: str, **variables: str) -> int:
    """13 shapes between ``ranks`` GPUs."""
    return run([sys.executable, "tests/collectives/cuda_stress.py", str(ranks), str(iterations), *more], **variables)


def models(folder: Path) -> int:
    """Operations, policies and whole models on one GPU, with the whole library."""
    given = {"DETINFER_GPU_LIBRARY": str(build(folder / "whole", sources=SOURCES))}
    failed = run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *MODELS], **given)
    bench = [sys.executable, "-m", "detinfer", "bench", "model", "--device", "cuda"]
    return failed | run([*bench, "--json", str(folder / "model.json")], **given)


def main() -> int:
    """Run what was asked for; 0 where all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", action="store_true")
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    chosen = parser.parse_args()
    ranks = str(chosen.ranks)
    folder = CHECKOUT / "build/gpu"
    if chosen.models:
        return models(folder)
    if chosen.mutants:
        for mutant in MUTANTS:
            library = build(folder / f"mutant{mutant}", mutant)
            stress(chosen.ranks, 40, "every path", DETINFER_GPU_LIBRARY=str(library))
        return 0
    library = build(folder)
    files = [f"tests/collectives/test_cuda_{name}.py" for name in TESTS]
    failed = run([sys.executable, "-m", "pytest", "-q", *files], DETINFER_GPU_LIBRARY=str(library))
    bench = [sys.executable, "-m", "detinfer", "bench", "collectives-cuda", "--ranks", ranks]
    given = {"DETINFER_GPU_LIBRARY": str(library)}
    if chosen.ranks > 2:
        table = str(folder / f"paths-{ranks}.json")
        failed |= run([*bench, "--tune", "--table", table], **given)
        given["DETINFER_CUDA_PATHS"] = table
    failed |= stress(chosen.ranks, 2000, **given)
    failed |= stress(chosen.ranks, 100, "every path", **given)
    return failed | run([*bench, "--json", str(folder / f"collectives-{ranks}.json")], **given)


if __name__ == "__main__":
    sys.exit(main())
