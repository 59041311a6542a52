"""The quick logarithm of a GPU's log_softmax (csrc/gpu/rows_math.h), run on the host: the exact one's value for every sum."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADER = (ROOT / "csrc/gpu/rows_math.h").read_text()
EXACT = "  return static_cast<float>(log64(static_cast<double>(sum)));\n}"
ONE, INFINITY = 0x3F800000, 0x7F800000


def built(where: Path, header: str = HEADER, off: int = 0) -> Path:
    """The program of ``rows/main.cpp`` around a header; ``off``: by how many units of the last place 1 / x is wrong."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    assert header.count(EXACT) == 1
    counted = header.replace(EXACT, "  decided++;\n" + EXACT).replace('"../order.h"', '"order.h"')
    (where / "rows_math.h").write_text(counted)
    program, source = where / f"logarithms{off}", ROOT / "tests/native/rows/main.cpp"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-w", f"-DOFF={off}", "-I", where, "-I", ROOT / "csrc"]
    for own in (["-march=native"], []):  # with an instruction for FMAs; without it the same, slower
        done = subprocess.run(
            [compiler, *flags, *own, source, "-o", program], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return program
    raise AssertionError(done.stderr)


def counts(program: Path, first: int, last: int, step: int = 1) -> tuple[int, int, int]:
    """(floats tried, of those other than log64's, of those that log64 decided)."""
    command = [program, str(first), str(last), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    tried, differ, decided = map(int, done.stdout.split())
    return tried, differ, decided


def test_every_sum_has_the_exact_logarithm(tmp_path: Path) -> None:
    """All floats from 1 to 2^12, more of them than rows of any length; then some of all that there are, NaN and below 1 too."""
    program = built(tmp_path)
    tried, differ, decided = counts(program, ONE, ONE + (12 << 23))
    assert (tried, differ) == (12 << 23, 0)
    assert 0 < decided < tried / 1000
    tried, differ, _ = counts(program, ONE, INFINITY, 31)
    assert tried > 2**30 / 32
    assert differ == 0
    assert counts(program, 0, 2**32, 10007)[1] == 0


@pytest.mark.parametrize("off", [-2, 3])
def test_the_reciprocal_may_be_a_little_wrong(off: int, tmp_path: Path) -> None:
    assert counts(built(tmp_path, off=off), ONE, INFINITY, 31)[1] == 0


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("fma_rn(t_low, q, first_low)", "first_low"),
        ("0x1p-35f", "0x1p-40f"),
        ("root_half = 0x3f3504f4u", "root_half = 0x3f800000u"),
        (
            "s_low = mul_rn(fma_rn(-s, by_low, fma_rn(-s, by, f)), inverse)",
            "s_low = mul_rn(fma_rn(-s, by, f), inverse)",
        ),
        ("bits - one < 0x40000000u && ", ""),
    ],
    ids=["a low part lost", "a range too narrow", "another fraction", "a sum's low part lost", "any sum"],
)
def test_faults_are_seen(right: str, wrong: str, tmp_path: Path) -> None:
    assert HEADER.count(right) == 1
    program = built(tmp_path, HEADER.replace(right, wrong))
    first = counts(program, ONE, ONE + (2 << 23))[1]
    assert first or counts(program, 0, 2**32, 10007)[1]
