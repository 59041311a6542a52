"""The project's checks. `python3 scripts/check.py` runs all of them in one environment that it makes.

With nox installed, `nox` runs them in an environment of their own each, and `nox -s tests -- tests/ops -x` passes what
follows `--` to the session's tool.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True

# Several processes share the cores, each with a thread for every core: one that waits for another must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPORTS = Path("build/reports")
ELSEWHERE = {"build": "tests/test_packaging.py", "docs": "tests/test_docs.py"}
"""Test files that a session of their own runs."""


def environment(session: nox.Session, *extras: str) -> None:
    """Install the project with ``extras``, unless the session shares an environment that was prepared before."""
    if session.virtualenv.is_sandboxed:
        session.run("python", "scripts/environment.py", *extras, silent=True)


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest, leaving its counts for scripts/check.py."""
    session.run("python", "-m", "pytest", f"--junit-xml={REPORTS / session.name}.xml", "--durations=5", *arguments)


@nox.session
def lint(session: nox.Session) -> None:
    """Lint and formatting, with ruff."""
    environment(session, "dev")
    session.run("python", "-m", "ruff", "check", *session.posargs)
    session.run("python", "-m", "ruff", "format", "--check", *session.posargs)


@nox.session
def types(session: nox.Session) -> None:
    """Types, with mypy --strict."""
    environment(session, "dev", "hf")
    session.run("python", "-m", "mypy", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """The wheel and the source distribution, used outside the checkout; symbols of the native library."""
    environment(session, "dev")
    pytest(session, *(session.posargs or [ELSEWHERE["build"]]))


@nox.session
def goldens(session: nox.Session) -> None:
    """The committed goldens verify, and recording them again gives the same bytes."""
    environment(session, "dev")
    session.run("python", "scripts/goldens.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """A short run of the main job on the real model: record, verify in a few trials."""
    session.run("python", "scripts/demo.py", *(session.posargs or ["--short"]))


@nox.session
def hip(session: nox.Session) -> None:
    """The GPU sources and Triton kernels compile for AMD; the first run fetches 1.2 GB of tools (scripts/hip.py)."""
    environment(session, "dev")
    session.run("python", "scripts/hip.py", *session.posargs)
    # Triton is among the tools; without them these tests are skipped.
    tools = (*session.posargs[:1], os.environ.get("DETINFER_HIP_TOOLS") or "build/hip")[0]
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), str(Path(tools).resolve())) if p)
    tests = [f"tests/ops/test_{name}.py" for name in ("attention_triton", "attention_deal", "matmul_triton")]
    session.run("python", "-m", "pytest", *tests, env={"PYTHONPATH": path})


@nox.session
def interception(session: nox.Session) -> None:
    """Every way of calling a collective is caught under the oldest torch and the newest (scripts/interception.py)."""
    environment(session, "dev", "hf")
    session.run("python", "scripts/interception.py", *session.posargs)


@nox.session
def evaluations(session: nox.Session) -> None:
    """lm_eval, Inspect, lighteval, transformers serve, pre-commit: the real packages; 1.6 GB (scripts/evaluations.py)."""
    environment(session, "dev", "hf")
    session.run("python", "scripts/evaluations.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation's Python runs, its commands and options exist, its links lead somewhere."""
    environment(session, "dev", "hf")
    pytest(session, *(session.posargs or [ELSEWHERE["docs"]]))


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite, less what the sessions build and docs run, a file for each CPU and one more at a time, four at most.

    One more, since much of the suite's time is ranks that wait for each other.
    """
    environment(session, "dev", "hf")
    whole = ["-n", str(min((os.cpu_count() or 1) + 1, 4)), "--dist", "loadfile", "--no-loadscope-reorder", "tests"]
    pytest(session, *(session.posargs or [*whole, *(f"--ignore={file}" for file in ELSEWHERE.values())]))
