"""A test-only build of csrc with a fault planted in its order over ranks; the variable ``PLANTED`` picks which.

The copy is compiled without optimisation and for one instruction set: seconds.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
OPTIMISED = "set(DETINFER_OPTIONS_baseline -O2)"
FAULTS = ("rotated", "lost_zero")

SOUND = """  V sum = term(0);
  for (int r = 1; r < kRanks; r++) sum = add_rn(sum, term(r));
  return sum;
"""
PLANT = """  const char* fault = std::getenv("PLANTED");
  const int turn = fault != nullptr && fault[0] == 'r' ? 1 : 0;
  V sum = term(turn);
  if (fault != nullptr && fault[0] == 'l') sum = add_rn(sum, V{});
  for (int r = 1; r < kRanks; r++) sum = add_rn(sum, term((r + turn) % kRanks));
  return sum;
"""


def build(folder: Path) -> Path:
    """The library's path; skips, with the reason, where there is no compiler."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin") is None:
            pytest.skip(f"a faulty library cannot be built here: no {tool}")
    shutil.copytree(CSRC, folder / "csrc")
    order = folder / "csrc/order.h"
    text = order.read_text()
    assert text.count(SOUND) == 1, "csrc/order.h adds the ranks in other words than this test knows"
    order.write_text(
        text.replace(SOUND, PLANT).replace("#include <cstdint>", "#include <cstdint>\n#include <cstdlib>", 1)
    )
    recipe = folder / "csrc/CMakeLists.txt"
    text = recipe.read_text()
    assert text.count(OPTIMISED) == 1, "csrc/CMakeLists.txt optimises the baseline in other words than this test knows"
    recipe.write_text(text.replace(OPTIMISED, "set(DETINFER_OPTIONS_baseline -O0)"))
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=any", "-DCMAKE_BUILD_TYPE=Debug", "-G", "Ninja"]
    for command in (
        ["cmake", "-S", folder / "csrc", "-B", folder / "build", *options],
        ["cmake", "--build", folder / "build"],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert done.returncode == 0, done.stdout
    return folder / "build/libdetinfer_cpu.so"
