"""The libraries that evaluations are run with, each in a folder of its own, and the tests that need them.

    python scripts/evaluations.py [NAME ...]

Installs what is missing (1.6 GB for all four, without torch, which stays the environment's) and runs each library's tests with
its folder on PYTHONPATH: they contradict each other in what they need, so they do not share one. Folders are in
$DETINFER_EVALUATIONS, else build/evaluations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
TESTS = "tests/integrations"
PAGE = f"{TESTS}/test_pipeline.py"
LIBRARIES = {
    "lm_eval": (("lm-eval>=0.4.13",), (f"{TESTS}/test_lm_eval.py", f"{PAGE}::test_an_evaluation_of_the_page")),
    "inspect_ai": (
        ("inspect-ai>=0.3.285",),
        (f"{TESTS}/test_inspect_ai.py", f"{PAGE}::test_an_evaluation_of_the_page"),
    ),
    "lighteval": (
        ("lighteval>=0.13", "datasets<5", "xxhash<4"),
        (f"{TESTS}/test_lighteval.py", f"{PAGE}::test_an_evaluation_of_the_page"),
    ),
    "serving": (
        ("transformers[serving]>=5.0",),
        (f"{TESTS}/test_transformers_serve.py", f"{PAGE}::test_the_server_of_the_page"),
    ),
    "pre_commit": (("pre-commit>=4", "check-jsonschema>=0.30"), (PAGE, f"{TESTS}/test_workflow.py")),
}
"""What pip is asked for, and the tests. The same versions as the extras in pyproject.toml."""
KEPT = ("torch", "triton", "nvidia-", "cuda-", "numpy", "transformers", "tokenizers", "huggingface")
"""Never put beside what the environment has: the beginnings of packages' names."""


def folder() -> Path:
    """Where the libraries are."""
    return Path(os.environ.get("DETINFER_EVALUATIONS") or CHECKOUT / "build/evaluations").resolve()


def prepared() -> bool:
    """Whether all of them are there."""
    return all((folder() / name / ".complete").is_file() for name in LIBRARIES)


def install(name: str, place: Path) -> None:
    """Everything a library needs that the environment lacks, into a folder. SystemExit where pip cannot."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        _run([*pip, "--dry-run", "--report", str(report), *LIBRARIES[name][0]])
        found = [one["metadata"] for one in json.loads(report.read_text(encoding="utf-8"))["install"]]
    exact = [f"{one['name']}=={one['version']}" for one in found if not one["name"].lower().startswith(KEPT)]
    if exact:
        _run([*pip, "--no-deps", "--target", str(place), *exact])
    place.mkdir(parents=True, exist_ok=True)
    (place / ".complete").touch()


def test(name: str, place: Path) -> int:
    """Run a library's tests; pytest's exit code."""
    path = os.pathsep.join(filter(None, (str(CHECKOUT), str(place), os.environ.get("PYTHONPATH"))))
    reports = CHECKOUT / "build/reports"
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"--junit-xml={reports / f'evaluations-{name}.xml'}",
        *LIBRARIES[name][1],
    ]
    return subprocess.run(command, cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def main(names: list[str]) -> int:
    """Install and test ``names`` (all by default); 1 where a test failed."""
    if unknown := set(names) - LIBRARIES.keys():
        sys.exit(f"{', '.join(sorted(unknown))}: one of {', '.join(LIBRARIES)}")
    failed = 0
    for name in names or LIBRARIES:
        place, start = folder() / name, time.monotonic()
        if not (place / ".complete").is_file():
            print(f"{name}: pip install {' '.join(LIBRARIES[name][0])}", flush=True)
            install(name, place)
            print(f"{name}: installed in {time.monotonic() - start:.0f} s", flush=True)
        failed += test(name, place) != 0
    return int(failed > 0)


def _run(command: list[str]) -> None:
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
        sys.exit("the installation failed; pip's lines above say why")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
