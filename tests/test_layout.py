"""The rules that keep the house readable: who imports whom, where each thing lies, how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "detinfer"
LONGEST = 600

# A module imports from its own package and from ranks below its own. Each top-level name has its rank here.
RANKS = {
    "errors": 0,
    "environment": 1,
    "bits": 1,
    "threads": 1,
    "torch_alone": 1,
    "tensor_file": 2,
    "native": 2,
    "reference": 2,
    "ops": 3,
    "collectives": 3,
    "policy": 4,
    "fingerprint": 5,
    "models": 5,
    "goldens": 6,
    "bench": 7,
    "run": 7,
    "reporters": 7,
    "testing": 7,
    "integrations": 8,
    "pytest_plugin": 8,
    "cli": 9,
    "__main__": 10,
}
FAMILIES = re.search(r"set\(DETINFER_FAMILIES ([^)]*)\)", (ROOT / "csrc/CMakeLists.txt").read_text()).group(1).split()
"""Families of operations, as csrc builds them."""

# What a family's kernels may include besides csrc's own headers: nothing that defines a weak symbol.
PLAIN_HEADERS = re.compile(
    r"c(assert|float|limits|math|stddef|stdint|stdlib|string)|\w+intrin\.h|arm_neon\.h|(stdlib|time)\.h"
    r"|cuda_runtime\.h|hip/hip_runtime\.h"  # platform.h, for a GPU compiler alone
)

# Written in two parts, so that this file passes its own rule.
BANNED = ("/ho" + "me/", "/ro" + "ot/", "/Us" + "ers/", "/wo" + "rk/", "TO" + "DO", "FIX" + "ME", "X" + "XX")


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks or would track, under the checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z", *patterns]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """(line, module inside detinfer) of every import in ``source``, wherever it stands; '' is detinfer itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            # `from detinfer import bits` imports a module, `from detinfer import deterministic` the package's name.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "detinfer" else [base]
        else:
            continue
        found += [
            (node.lineno, name[len("detinfer") :].lstrip(".")) for name in names if f"{name}.".startswith("detinfer.")
        ]
    return found


def upward(module: str, source: str) -> list[str]:
    """Imports in ``module`` (as ops.matmul) that do not go down, one sentence each."""
    own = module.split(".")[0]
    wrong = []
    for line, target in imports(source, f"detinfer.{module}".rpartition(".")[0]):
        top = target.split(".")[0]
        if top in ("", own):
            continue
        if top not in RANKS:
            wrong.append(f"{module}:{line} imports {top!r} from detinfer itself: import the module that defines it")
        elif RANKS[top] >= RANKS[own]:
            wrong.append(f"{module}:{line} (rank {RANKS[own]}) imports {target} (rank {RANKS[top]})")
    return wrong


def modules() -> list[tuple[str, Path]]:
    """Dotted names inside detinfer, and files, of all modules but the package's own."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found.append((name, path))
    return found


def test_every_module_has_a_rank() -> None:
    """A new top-level module says where in the import order it stands."""
    assert {name.split(".")[0] for name, _ in modules()} - {"__main__"} <= set(RANKS)


def test_imports_go_down() -> None:
    """No module imports from its own rank or from above."""
    assert [line for name, path in modules() for line in upward(name, path.read_text())] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.matmul", "from detinfer.policy import apply"),
        ("native", "def f():\n    import detinfer.ops.rows"),
        ("reference.rows", "from ..native import library"),
        ("bits", "from detinfer import cli"),
        ("ops.rows", "from detinfer import deterministic"),
    ],
)
def test_upward_import_is_seen(module: str, source: str) -> None:
    """The rule sees an upward import in each of its spellings."""
    assert len(upward(module, source)) == 1


def test_downward_import_is_allowed() -> None:
    """Imports from below, from the same package and from elsewhere pass."""
    source = "import torch\nimport detinfer\nfrom detinfer import bits\nfrom .table import x\nfrom detinfer.errors import Diverged"
    assert upward("ops.matmul", source) == []


def test_no_file_is_long() -> None:
    """A reader can hold a file in mind."""
    files = tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cmake", "CMakeLists.txt")
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 10
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def includes(path: Path) -> list[str]:
    """What a C++ file includes, with its brackets or quotes."""
    return re.findall(r'^\s*#\s*include\s*(<[^>]+>|"[^"]+")', path.read_text(), re.MULTILINE)


def test_csrc_knows_neither_torch_nor_python() -> None:
    """One built library serves every torch and every Python."""
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert files
    foreign = re.compile(r"[<\"](torch|ATen|c10|aten|Python\.h|pybind11)")
    assert [(path.name, name) for path in files for name in includes(path) if foreign.match(name)] == []


def test_family_kernels_use_plain_headers() -> None:
    """A family is compiled once for each instruction set: it includes nothing that defines weak symbols."""
    own = [ROOT / "csrc/types.h", ROOT / "csrc/platform.h", *(ROOT / f"csrc/cpu/{name}.cpp" for name in FAMILIES)]
    own += [ROOT / f"csrc/{name}.h" for name in FAMILIES]
    own += (ROOT / "csrc/cpu").glob("*.h")
    named = [(path.name, name) for path in own for name in includes(path) if name.startswith("<")]
    assert named
    assert [pair for pair in named if not PLAIN_HEADERS.fullmatch(pair[1].strip("<>"))] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_one_word_finds_everything(family: str) -> None:
    """A family of operations has one name in every place."""
    kind = "collectives" if family == "all_reduce" else "ops"
    places = [
        f"csrc/{family}.h",
        f"csrc/cpu/{family}.cpp",
        f"detinfer/{kind}/{family}.py",
        f"detinfer/reference/{family}.py",
        f"tests/{kind}/test_{family}.py",
        f"docs/ops/{family}.md",
    ]
    assert [place for place in places if not (ROOT / place).is_file()] == []


def test_no_banned_words() -> None:
    """No path of somebody's machine and no unfinished work in what is committed."""
    suffixes = {".py", ".md", ".toml", ".h", ".cpp", ".txt", ".yml", ".json", ""}
    found = []
    for path in tracked():
        if path.suffix in suffixes and path.name != "LICENSE":
            text = path.read_text(encoding="utf-8")
            found += [f"{path.relative_to(ROOT)}: {word}" for word in BANNED if word in text]
    assert found == []
