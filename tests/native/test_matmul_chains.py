"""fp32's blocks of chains (csrc/gpu/matmul_chains.h) without a GPU: their own source, a block's threads as threads.

Barriers, copies and shared memory are ``chains/matmul_tma.h``. That shows who computes what from which bytes, in which
order, and that a stage is waited for and given back; what the instructions themselves do, a GPU has to show
(``tests/ops/test_matmul_cuda.py``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADER = (ROOT / "csrc/gpu/matmul_chains.h").read_text()
SHAPES = re.findall(r"launch_chains<(\d[\d, ]*)>", (ROOT / "csrc/matmul_fp32.cu").read_text())
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-w")
NOT_FOR_HOSTS = (
    '    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");\n',
    "  extern __shared__ char raw[];\n",
)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """This machine's, where it has C++20's barriers."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    probe = tmp_path_factory.mktemp("probe") / "probe.cpp"
    probe.write_text("#include <barrier>\nstd::barrier<> one(1);\n")
    command = [found, *FLAGS, "-fsyntax-only", probe]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{found} has no <barrier> of C++20")
    return found


def outcome(compiler: str, where: Path, header: str, shapes: list[str]) -> list[tuple[int, ...]] | str:
    """For each shape, way of landing and size: what ``chains/main.cpp`` prints; or how the program ended."""
    for line in NOT_FOR_HOSTS:
        assert header.count(line) == 1
        header = header.replace(line, "")
    for name in ("matmul_tma.h", "main.cpp"):
        shutil.copy(ROOT / "tests/native/chains" / name, where)
    (where / "matmul_chains.h").write_text(header)
    listed = "-DSHAPES=" + " ".join(f"SHAPE({shape})" for shape in shapes)
    command = [compiler, *FLAGS, listed, where / "main.cpp", "-o", where / "main"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([where / "main"], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        return f"ended with {done.returncode}: {done.stdout}{done.stderr}"
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


def test_every_shape_gives_one_chain_of_fmas(compiler: str, tmp_path: Path) -> None:
    found = outcome(compiler, tmp_path, HEADER, SHAPES)
    assert isinstance(found, list), found
    assert len(SHAPES) > 0 and len(found) == 5 * len(SHAPES)
    for x, w, late, m, n, k, other, shows in found:
        assert other == 0, (x, w, late, m, n, k)
        assert k < 32 or shows > m * n / 10, "these inputs would not show a wrong order"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if (ends && !there && chunk < chunks) barrier_wait(full + s * 8, phase);", ""),
        ("if (c >= S) barrier_wait(empty + c % S * 8, (c / S - 1) & 1);", ""),
        ("there = barrier_done(full + next_s * 8, next_phase)", "there = true"),
        ("begins && chunk > 0, empty + (s == 0 ? S - 1 : s - 1) * 8", "begins && chunk > 0, empty + s * 8"),
        ("const uint32_t x_here = (xs ^ t % kPieces << 4)", "const uint32_t x_here = (xs ^ (t ^ 1) % kPieces << 4)"),
        ("chain(a[(t + 1) % D], b[(t + 1) % D]);", "chain(a[(t + 1) % D], b[t % D]);"),
        ("for (int t = 1; t < D; t++) chain(a[t], b[t]);", ""),
        ("const int boxes = static_cast<int>(p.k / 32)", "const int boxes = static_cast<int>((p.k + 31) / 32)"),
    ],
    ids=["a stage not waited for", "a stage not free", "an answer not heard", "another stage given back", "pieces of x swapped",
         "x and w apart", "the last pieces lost", "terms past the end"],
)  # fmt: skip
def test_faults_are_seen(right: str, wrong: str, compiler: str, tmp_path: Path) -> None:
    """A block that a warp of its own feeds, in turns of a stage."""
    assert HEADER.count(right) == 1
    found = outcome(compiler, tmp_path, HEADER.replace(right, wrong), ["16, 24, 2, 3, 4, 3, 32, 2, 2"])
    assert isinstance(found, str) or any(other > 0 for *_, other, _ in found)
