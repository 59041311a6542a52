"""Everything that needs a GPU, in one command: builds the GPU library, runs the tests, the stress and the benchmark.

    python scripts/gpu.py                    # build, tests marked gpu, 2,000 iterations of 13 shapes, benchmark: 2 GPUs
    python scripts/gpu.py --ranks 8          # the same between 8, with a table of paths that is made first
    python scripts/gpu.py --models           # one GPU: tests of operations and policies, a whole model's bytes and times
    python scripts/gpu.py --verify           # record, verify and time models of a real one's size; over --ranks GPUs too where there
                                             # are as many (2), and the policy's cost on them
    python scripts/gpu.py --racecheck        # compute-sanitizer's look at shared memory, small shapes between two GPUs
    python scripts/gpu.py --mutants          # builds with one planted fault each, and what the stress says of them

Needs nvcc and torch with CUDA. What it builds is under build/gpu; `--prebuilt FILE` takes a library that is built already, and
`--limit SECONDS` ends a step that takes longer. The last lines say how each step ended and how long it took. The check for AMD
is scripts/hip.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
CSRC = CHECKOUT / "csrc"
COLLECTIVES = ("communicator_gpu", "all_reduce", "all_gather", "all_reduce_rms_norm")
SOURCES = tuple(sorted(file.stem for file in CSRC.glob("*.cu")))
PATH = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
MUTANTS = (1, 2, 4, 5, 6, 7, 8)
TESTS = ("all_reduce", "vectors", "processes", "protocol", "mismatch")
MODELS = ("tests", "--ignore=tests/collectives")
"""Every test marked gpu, less those of the collectives, whose kernels have a run of their own."""
WHOLE = {"qwen3-8b": 8, "qwen3-moe": 4}
"""Models of a real one's size, and their KV heads: ranks share them out evenly."""
ENDED: list[tuple[float, str, str]] = []
"""Seconds, how it ended, and the command of every step."""


def run(command: list[str], limit: float | None = None, **variables: str) -> int:
    """Run a command in the checkout, its output as it comes; its exit status, 124 where it took more than ``limit`` seconds."""
    print("$", " ".join(command), flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *PATH]), **variables}
    start = time.monotonic()
    try:
        status = subprocess.run(command, cwd=CHECKOUT, env=environment, check=False, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        status = 124
    ended = "passed" if status == 0 else "took too long" if status == 124 else f"ended with {status}"
    ENDED.append((time.monotonic() - start, ended, " ".join(command)))
    return status


def build(folder: Path, mutant: int = 0, sources: Sequence[str] = COLLECTIVES) -> Path:
    """The GPU library of ``sources`` for the architecture 90, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = ["nvcc", "-O3", "-std=c++17", "-arch=sm_90", "-fmad=false", "-cudart", "static"]
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


def stress(ranks: int, iterations: int, *more: str, limit: float | None = None, **variables: str) -> int:
    """13 shapes between ``ranks`` GPUs."""
    command = [sys.executable, "tests/collectives/cuda_stress.py", str(ranks), str(iterations), *more]
    return run(command, limit, **variables)


def suite(*words: str, limit: float | None = None, **variables: str) -> int:
    """pytest's exit status; in several processes at once for tests that leave room for others, where xdist is installed."""
    beside = ["-n", "8", "--dist", "worksteal", "-p", "no:benchmark"] if importlib.util.find_spec("xdist") else []
    options = [] if any("collectives" in word and "ignore" not in word for word in words) else beside
    return run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *options, *words], limit, **variables)


def collectives(folder: Path, ranks: int, limit: float | None, **given: str) -> int:
    """Tests, stress and benchmark between ``ranks`` GPUs; a table of paths first where there are more than two."""
    failed = suite(*(f"tests/collectives/test_cuda_{name}.py" for name in TESTS), limit=limit, **given)
    bench = [sys.executable, "-m", "detinfer", "bench", "collectives-cuda", "--ranks", str(ranks)]
    if ranks > 2:
        table = str(folder / f"paths-{ranks}.json")
        failed |= run([*bench, "--tune", "--table", table], limit, **given)
        given["DETINFER_CUDA_PATHS"] = table
    failed |= stress(ranks, 2000, limit=limit, **given)
    failed |= stress(ranks, 100, "every path", limit=limit, **given)
    return failed | run([*bench, "--json", str(folder / f"collectives-{ranks}.json")], limit, **given)


def models(folder: Path, limit: float | None, **given: str) -> int:
    """Operations, policies and whole models on one GPU."""
    bench = [sys.executable, "-m", "detinfer", "bench", "model", "--device", "cuda"]
    failed = suite(*MODELS, limit=limit, **given)
    return failed | run([*bench, "--json", str(folder / "model.json")], limit, **given)


def verify(folder: Path, count: int, limit: float | None, **given: str) -> int:
    """Record, verify with the control and time models of a real one's size, on one GPU and over ``count``. One at a time: kernels
    that wait for another GPU and share their own with other programs wait for those as well."""
    import torch

    failed, over = 0, ("--tp", str(count))
    enough = torch.cuda.device_count() >= count > 1
    if not enough:
        print(f"skipped  {' '.join(over)}: {torch.cuda.device_count()} GPUs here", flush=True)
    shared = [(name, over) for name, heads in WHOLE.items() if enough and heads % count == 0]
    for name, ranks in [*((name, ()) for name in WHOLE), *shared]:
        golden = folder / f"{name}{''.join(ranks)}"
        command = [sys.executable, "-m", "detinfer"]
        options = ["--device", "cuda", "--tensors", "none", "--force", *ranks, "-o", str(golden)]
        if run([*command, "record", f"random:{name}", *options], limit, **given):
            failed = 1
            continue
        control = ["--control"] if not ranks else []
        failed |= run([*command, "verify", str(golden), *control, *ranks, "--json", f"{golden}.json"], limit, **given)
        if not ranks:
            failed |= run([sys.executable, "-m", "detinfer.bench.verify", str(golden)], limit, **given)
    if enough:
        found = str(folder / f"model-{count}.json")
        timed = [sys.executable, "-m", "detinfer", "bench", "model", "--device", "cuda", *over, "--json", found]
        failed |= run(timed, limit, **given)
    return failed


def racecheck(ranks: int, limit: float | None, **given: str) -> int:
    """compute-sanitizer's racecheck of our kernels alone, which are slow under it: shapes of up to 81 tokens, once."""
    tool = ["compute-sanitizer", "--tool", "racecheck", "--target-processes", "all", "--error-exitcode", "9"]
    only = ["--kernel-name", "kernel_substring=detinfer"]
    command = [sys.executable, "tests/collectives/cuda_stress.py", str(ranks), "1", "every path"]
    return run([*tool, *only, *command, "--most", "81", "--timeout", "60"], limit, **given)


def mutants(folder: Path, ranks: int, limit: float | None) -> int:
    """What the stress says of each planted fault: printed, and no failure."""
    with ThreadPoolExecutor() as pool:
        built = list(pool.map(lambda mutant: build(folder / f"mutant{mutant}", mutant), MUTANTS))
    for library in built:
        stress(ranks, 40, "every path", limit=limit, DETINFER_GPU_LIBRARY=str(library))
    return 0


def main() -> int:
    """Run what was asked for; 0 where all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("models", "verify", "racecheck", "mutants"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prebuilt", type=Path)
    parser.add_argument("--limit", type=float)
    chosen = parser.parse_args()
    folder = CHECKOUT / "build/gpu"
    whole = chosen.models or chosen.verify
    try:
        if chosen.mutants:
            return mutants(folder, chosen.ranks, chosen.limit)
        library = chosen.prebuilt or build(
            folder / ("whole" if whole else ""), sources=SOURCES if whole else COLLECTIVES
        )
        given = {"DETINFER_GPU_LIBRARY": str(library)}
        failed = 0
        if chosen.models:
            failed |= models(folder, chosen.limit, **given)
        if chosen.verify:
            failed |= verify(folder, chosen.ranks, chosen.limit, **given)
        if chosen.racecheck:
            failed |= racecheck(chosen.ranks, chosen.limit, **given)
        elif not whole:
            failed |= collectives(folder, chosen.ranks, chosen.limit, **given)
        return failed
    finally:
        for seconds, ended, command in ENDED:
            print(f"{seconds:7.1f} s  {ended}: {command}")


if __name__ == "__main__":
    sys.exit(main())
