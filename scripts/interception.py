"""The interception matrix: every way of calling a collective is caught, under the torches that are supported.

    python scripts/interception.py [VERSION ...]     # 2.11.0 and newest where none is given

The rows are tests/policy/test_distributed.py and test_front.py, and those of tests/cli/test_tp.py in which the launcher
starts ranks that record a golden, and ranks that end with an error: it is built on torch's own, whose arguments change
from one torch to the next. A column is a torch. The column of the environment's own torch is part of the test suite.
Another torch is installed alone, in build/torch-VERSION, 5 GB where the index has builds for GPUs only; what else is
needed comes from this environment (scripts/environment.py makes one). An installed torch is kept: delete its folder to
have it fetched again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
VERSIONS = ("2.11.0", "newest")
"""The oldest torch that is supported, and what the index has."""
ROWS = (
    "tests/policy/test_distributed.py",
    "tests/policy/test_front.py",
    "tests/cli/test_tp.py::test_a_golden_names_its_ranks_and_holds_every_ranks_units",
    "tests/cli/test_tp.py::test_an_error_of_every_rank_is_said_once",
)
REPORTS = CHECKOUT / "build" / "reports"


def main(versions: list[str]) -> int:
    """Run every column; 0 where every row of each is caught."""
    return int(any(list(map(column, versions or VERSIONS))))


def column(version: str) -> int:
    """pytest's exit status under this torch; 0, with the reason printed, where it cannot be installed."""
    folder = CHECKOUT / "build" / f"torch-{version}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    start = time.monotonic()
    if not python.exists() or subprocess.run([python, "-c", "import torch"], check=False).returncode != 0:
        venv.create(folder, clear=True, symlinks=os.name != "nt")
        wanted = "torch" if version == "newest" else f"torch=={version}"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-input"]
        pip += [] if os.environ.get("PYTHONDONTWRITEBYTECODE") else ["--no-compile"]
        if subprocess.run([*pip, wanted], stdin=subprocess.DEVNULL, check=False).returncode != 0:
            print(f"skipped  torch {version}: it cannot be installed here; pip's lines above say why", flush=True)
            shutil.rmtree(folder)
            return 0
        # Behind its own packages, so that its torch is found first.
        own = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        shared = sysconfig.get_path("purelib")
        (own / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n", encoding="utf-8")
    installed = time.monotonic() - start
    found = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    print(f"torch {found.stdout.strip()}: installed in {installed:.0f} s", flush=True)
    report = f"--junit-xml={REPORTS / f'interception-{version}.xml'}"
    return subprocess.run([python, "-m", "pytest", "-q", report, *ROWS], cwd=CHECKOUT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
