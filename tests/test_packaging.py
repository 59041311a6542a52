"""The wheel and the source distribution: built here, used outside the checkout; what the native library needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch

import detinfer

ROOT = Path(__file__).parents[1]
HIGHER_LEVELS = ("avx2", "avx512", "avx512_bf16")


@dataclass(frozen=True)
class Wheel:
    """A built wheel, the folder that it was installed into, and the folder of its objects."""

    file: Path
    installed: Path
    objects: Path


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command without this process's Python settings; its two outputs together are in ``stdout``."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DETINFER_", "PYTHON"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def pip(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run pip as this interpreter's module."""
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd, **variables)


def outside(wheel: Wheel, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed wheel, and past an editable install of the checkout (-S: no .pth file is read)."""
    places = [wheel.installed, Path(torch.__file__).parents[1], Path(click.__file__).parents[1]]
    return run(sys.executable, "-S", *arguments, cwd=cwd, PYTHONPATH=os.pathsep.join(map(str, places)))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    built = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert built.returncode == 0, built.stdout
    (file,) = folder.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """The wheel, built from the source distribution and installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(
            folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )  # not in 3.11.3 and older
    (source,) = folder.glob("detinfer-*")
    objects = folder / "objects"
    # Not optimised: a tenth of the time, and every inline function is emitted, so that no weak symbol hides.
    settings = (f"--config-settings=build-dir={objects}", "--config-settings=cmake.build-type=Debug")
    built = pip("wheel", "--no-build-isolation", "--no-deps", *settings, "--wheel-dir", folder, source, cwd=folder)
    assert built.returncode == 0, built.stdout
    (file,) = folder.glob("*.whl")
    installed = folder / "installed"
    done = pip("install", "--no-deps", "--no-index", "--target", installed, file, cwd=folder)
    assert done.returncode == 0, done.stdout
    return Wheel(file, installed, objects)


def test_version_is_written_once(wheel: Wheel) -> None:
    """The wheel's version is detinfer.__version__, and no other file states it."""
    assert wheel.file.name.split("-")[1] == detinfer.__version__
    for name in ("pyproject.toml", "noxfile.py", "csrc/CMakeLists.txt"):
        assert detinfer.__version__ not in (ROOT / name).read_text()


def test_one_wheel_for_every_python_and_torch(wheel: Wheel) -> None:
    """Its tag names no Python, and it holds the library and the licence but no sources of either kind."""
    assert re.search(r"-py3-none-\w+\.whl$", wheel.file.name)
    with zipfile.ZipFile(wheel.file) as archive:
        names = archive.namelist()
        metadata = archive.read(f"detinfer-{detinfer.__version__}.dist-info/METADATA").decode()
    assert [name for name in names if name.startswith("detinfer/lib/")] == ["detinfer/lib/libdetinfer_cpu.so"]
    assert "detinfer/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    outside = [name for name in names if not name.startswith(("detinfer/", f"detinfer-{detinfer.__version__}."))]
    assert outside == []
    assert "Requires-Dist: torch>=2.11" in metadata


def test_sdist_holds_what_the_build_needs(sdist: Path) -> None:
    """csrc is whole, and nothing that a build made is in it."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources
    assert sources <= names
    assert [name for name in names if name.startswith(("build/", ".venv/", "runs/")) or name.endswith(".so")] == []


def test_wheel_works_outside_the_checkout(wheel: Wheel, tmp_path: Path) -> None:
    """Installed elsewhere, it loads its own library and computes a sum in the contract's order."""
    code = (
        "import torch, detinfer\n"
        "from detinfer import native\n"
        "state = native.load()\n"
        "assert isinstance(state, native.Loaded), state\n"
        "x = torch.tensor([[2.0**24, 1.0, -(2.0**24), 1.0]])\n"
        "with detinfer.deterministic('batch'):\n"
        "    total = x.sum(-1)\n"
        "print(detinfer.__file__, state.path, int(total), sep='\\n')\n"
    )
    done = outside(wheel, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    package, library, total = done.stdout.splitlines()[-3:]
    assert Path(package).is_relative_to(wheel.installed)
    assert Path(library).is_relative_to(wheel.installed)
    # Lanes 0 to 3 hold one element each; halving adds 2 to 0 and 3 to 1, then 1 to 0: (2^24 - 2^24) + (1 + 1).
    # From left to right, or joining neighbours, a 1 is lost beside 2^24 and the sum is 1.
    assert int(total) == 2


def test_module_runs_as_a_program(wheel: Wheel, tmp_path: Path) -> None:
    """`python -m detinfer` is the command, from the wheel too."""
    done = outside(wheel, "-m", "detinfer", "env", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert Path(json.loads(done.stdout)["native"]["path"]).is_relative_to(wheel.installed)


def test_no_compiler_is_one_sentence(tmp_path: Path) -> None:
    """Without a C++ compiler the installation stops, and pip shows what to install."""
    arguments = ["wheel", "--no-build-isolation", "--no-deps", f"--config-settings=build-dir={tmp_path / 'objects'}"]
    done = pip(*arguments, "--wheel-dir", tmp_path, ROOT, cwd=tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert done.returncode != 0
    assert "detinfer needs a C++17 compiler" in done.stdout
    assert list(tmp_path.glob("*.whl")) == []


def tool(name: str) -> str:
    """A program of binutils, or a skip that says which is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} (binutils) is not on this machine")
    return path


def weak(nm: str, objects: list[Path]) -> list[str]:
    """Weak or unique definitions in ``objects``: those of which the linker keeps one for all."""
    found = []
    for file in objects:
        for line in subprocess.run([nm, file], check=True, capture_output=True, text=True).stdout.splitlines():
            kind = line.split()[-2]
            if kind in "VWu" or (kind in "vw" and len(line.split()) == 3):
                found.append(f"{file.parent.name} {line}")
    return found


def test_higher_levels_leak_no_weak_symbols(wheel: Wheel) -> None:
    """No function compiled for a higher instruction set can be the one that the linker keeps for baseline."""
    nm = tool("nm")
    folders = [path for path in wheel.objects.rglob("*.dir") if path.name.endswith(HIGHER_LEVELS, 0, -len(".dir"))]
    objects = [path for folder in folders for path in folder.rglob("*.o")]
    if not folders and not list(wheel.objects.rglob("*_baseline.dir/**/*.o")):
        pytest.fail(f"no objects under {wheel.objects}")
    if not objects:
        pytest.skip("this machine's build has the baseline level only")
    assert weak(nm, objects) == []


def test_weak_symbol_is_seen(tmp_path: Path) -> None:
    """The rule above sees an inline function that a family might use by mistake."""
    nm, compiler = tool("nm"), tool(os.environ.get("CXX", "c++"))
    source = tmp_path / "family.cpp"
    source.write_text("inline int shared(int x) { return x + 1; }\nint (*kept)(int) = shared;\n")
    subprocess.run([compiler, "-c", source, "-o", tmp_path / "family.o"], check=True)
    assert len(weak(nm, [tmp_path / "family.o"])) == 1


def test_library_needs_only_the_c_library(wheel: Wheel) -> None:
    """One file serves every torch and every C++ runtime: it links libc and libm, and no symbol of libstdc++."""
    readelf = tool("readelf")
    library = wheel.installed / "detinfer/lib/libdetinfer_cpu.so"
    dynamic = subprocess.run([readelf, "-dW", library], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert needed
    assert {name for name in needed if not re.match(r"lib(c|m|pthread)\.so|ld-linux", name)} == set()
    symbols = subprocess.run([readelf, "--dyn-syms", "-W", library], check=True, capture_output=True, text=True).stdout
    exported = re.findall(r"(?:GLOBAL|WEAK)\s+DEFAULT\s+\d+ (\S+)", symbols)
    assert [name for name in exported if not name.startswith("detinfer_")] == []
