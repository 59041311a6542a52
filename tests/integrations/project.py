"""A project beside this checkout, made of the files of docs/recipes/ci.md: what the tests of that page run in."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/recipes/ci.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Place:
    """A project's folder, and an environment whose ``python`` and ``detinfer`` are this checkout's."""

    folder: Path
    variables: dict[str, str]

    def run(self, command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A command line in the folder, as GitHub's runners do: bash that ends at the first failure."""
        variables = {**self.variables, **more}
        return subprocess.run(
            ["bash", "-e", "-c", command], cwd=self.folder, env=variables, capture_output=True, text=True, check=False
        )

    @property
    def installed(self) -> list[list[str]]:
        """What pip was asked for."""
        log = self.folder.parent / "pip.log"
        return [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []


def project(folder: Path) -> Place:
    """A folder ``here`` and programs beside it."""
    (folder / "here").mkdir()
    (folder / "bin").mkdir()
    python = shlex.quote(sys.executable)
    pip = f'if [ "$1 $2" = "-m pip" ]; then shift 2; printf "%q " "$@" >> {folder}/pip.log; echo >> {folder}/pip.log; exit 0; fi\n'
    for name, text in {"python": f'{pip}exec {python} "$@"\n', "detinfer": f'exec {python} -m detinfer "$@"\n'}.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", ""), "."]))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "GITHUB", "CI"))}
    own = {"PATH": path, "PYTHONPATH": modules, "HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not any(one.name == "detinfer" for one in importlib.metadata.entry_points(group="pytest11")):
        own["PYTEST_PLUGINS"] = "detinfer.pytest_plugin"  # a checkout that is not installed
    return Place(folder / "here", {**kept, **own})


def files() -> dict[str, str]:
    """The page's files: a block behind a line that ends in a name in backquotes."""
    blocks = re.findall(r"`([\w./-]+\.(?:py|ya?ml))`[^`\n]*(?:\n[^`\n]+)*\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return dict(blocks)


def commands() -> list[str]:
    """The page's command lines, in their order."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def record(folder: Path) -> Path:
    """A folder with the page's module and its golden."""
    place = project(folder)
    (place.folder / "block.py").write_text(files()["block.py"])
    found = place.run(commands()[0])
    assert found.returncode == 0, found.stderr
    return place.folder


def given(place: Place, recorded: Path) -> Path:
    """The page's golden, in this project."""
    shutil.copytree(recorded, place.folder, dirs_exist_ok=True)
    return place.folder / "goldens/block"


def damage(golden: Path) -> None:
    """Turn one bit of the tensors."""
    file = golden / "tensors.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
