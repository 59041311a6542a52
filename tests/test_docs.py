"""The documentation is true: its Python runs, its commands parse, its options, variables and links exist.

Blocks marked ```python run from top to bottom, in one namespace for each file and in an empty folder; one below a line that
ends in a file's name in backquotes is also written there. In blocks marked
```console, lines that begin with `$ ` are commands: those of detinfer are parsed, the project's scripts must exist.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from detinfer import errors
from detinfer.cli import cli
from detinfer.cli.eval import Default

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "goldens").rglob("*.md")])
EXITS = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its first line's number in the file, its text."""

    language: str
    line: int
    text: str
    file: str = ""


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text."""
    for found in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", text, re.MULTILINE | re.DOTALL):
        name = re.search(r"`([\w.-]+\.py)`:\n\n$", text[: found.start()])
        yield Block(found[1], text.count("\n", 0, found.start(2)) + 1, found[2], name[1] if name else "")


def commands(text: str) -> list[str]:
    """The command lines of the console blocks, lines that end in a backslash joined."""
    lines = [block.text.replace("\\\n", " ") for block in blocks(text) if block.language == "console"]
    return [line[2:].partition(" #")[0] for part in lines for line in part.splitlines() if line.startswith("$ ")]


def named(path: Path) -> str:
    """A test's id: where the file is."""
    return str(path.relative_to(ROOT))


def parse(words: list[str]) -> None:
    """Parse a command line of detinfer, as far as names of commands and options go; runs nothing, opens nothing."""
    command: click.Command = cli
    context = click.Context(cli, info_name="detinfer")
    while isinstance(command, click.Group) and words:
        if isinstance(command, Default):
            words = command.named(words)
        if words[0].startswith("-"):
            break
        name, found, rest = command.resolve_command(context, words)
        assert found is not None  # else it raised
        context = click.Context(found, info_name=name, parent=context)
        command, words = found, rest
    _, rest, _ = command.make_parser(context).parse_args(list(words))
    wanted = sum(isinstance(parameter, click.Argument) and parameter.required for parameter in command.params)
    help_only = any(word in ("--help", "-h", "--version") for word in words)
    if rest or (wanted and not help_only and len([word for word in words if not word.startswith("-")]) < wanted):
        raise click.UsageError(f"arguments of {command.name}: {words}")


def wrong(command: str) -> str | None:
    """What is wrong with a documented command line; None where nothing is."""
    words = shlex.split(command.partition(" && ")[0].partition(" > ")[0])
    if words[0] == "detinfer" or words[:3] in (["python", "-m", "detinfer"], ["python3", "-m", "detinfer"]):
        try:
            parse(words[1:] if words[0] == "detinfer" else words[3:])
        except click.ClickException as error:
            return f"{command}: {error.format_message()}"
    elif words[0] in ("python", "python3") and not words[1].startswith("-") and not (ROOT / words[1]).is_file():
        return f"{command}: there is no {words[1]}"
    elif "install" in words and any(re.match(r"(detinfer|aiter)([\[=<>~!;@ ]|$)", word) for word in words[1:]):
        return f"{command}: the package of that name is somebody else's"
    return None


def options(command: click.Command) -> set[str]:
    """Every option of a command and of the commands below it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return {name for name in own if name.startswith("-")}.union(*(options(child) for child in below))


def verbs(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that runs something, by its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, f"{before}{name} ")
        else:
            yield before + name, command


@pytest.mark.parametrize("path", FILES, ids=named)
def test_python_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of Python runs, one after the other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
            monkeypatch.delitem(sys.modules, Path(block.file).stem, raising=False)
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, path, "exec"), namespace)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_commands_parse(path: Path) -> None:
    """Every command shown can be typed."""
    found = [wrong(command) for command in commands(path.read_text(encoding="utf-8"))]
    assert [problem for problem in found if problem] == []


@pytest.mark.parametrize(
    "command",
    [
        "detinfer record smollm2 -o runs --no-such-option",
        "detinfer remember smollm2",
        "detinfer diff a",
        "python3 scripts/none.py",
        "pip install detinfer",
        "python3 -m pip install 'detinfer[hf]'",
        "pip install aiter==1.0",
    ],
)
def test_wrong_command_is_seen(command: str) -> None:
    """The rule sees a command that cannot be typed, or should not be."""
    assert wrong(command) is not None


@pytest.mark.parametrize("path", FILES, ids=named)
def test_options_exist(path: Path) -> None:
    """An option in `code` that stands alone or after detinfer is one of detinfer's."""
    text = re.sub(r"^```.*?^```\s*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if re.match(r"--?\w|detinfer ", span)]
    used = {word for span in spans for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert used - options(cli) - {"--help", "--version"} == set()


def test_reference_is_complete() -> None:
    """docs/reference/cli.md has a section for every verb with every option of it, and names no other."""
    text = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `detinfer ([^`]+)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(dict(verbs(cli)))
    for name, command in verbs(cli):
        listed = set(re.findall(r"^\| `(?:-\w, )?(--[\w-]+)", sections[name], re.MULTILINE))
        assert listed == {option for option in options(command) if option.startswith("--")}, name


@pytest.mark.parametrize("name", ["README.md", "docs/reference/cli.md"])
def test_exit_codes(name: str) -> None:
    """The table of exit codes has every code, and no other."""
    table = re.findall(r"^\| (\d+) \|", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(int(code) for code in table) == sorted(EXITS.values())


def test_variables_exist_and_are_documented() -> None:
    """Every DETINFER_ variable that the code reads is documented, and no other."""
    read = {
        name
        for path in (ROOT / "detinfer").rglob("*.py")
        for name in re.findall(r'"(DETINFER_[A-Z_]+)"', path.read_text())
    }
    read |= {
        name
        for path in (ROOT / "csrc").rglob("*.[ch]*")
        for name in re.findall(r'getenv\("(DETINFER_[A-Z0-9_]+)"', path.read_text(encoding="utf-8"))
    }
    page = (ROOT / "docs/reference/variables.md").read_text(encoding="utf-8")
    assert read
    assert set(re.findall(r"^\| `(DETINFER_[A-Z0-9_]+)`", page, re.MULTILINE)) == read
    for path in FILES:
        assert set(re.findall(r"\bDETINFER_(?:CPU|NATIVE)_[A-Z0-9_]+", path.read_text(encoding="utf-8"))) <= read, path


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    """Every relative link names a file of the repository, and a heading of it where it names one."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        if not place.exists() or (anchor and anchor not in anchors(place)):
            dead.append(target)
    assert dead == []


def test_every_page_is_reached() -> None:
    """docs/index.md leads to every page."""
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md")}
    index = ROOT / "docs/index.md"
    linked = re.findall(r"\]\(([^)#\s]+)", index.read_text(encoding="utf-8"))
    assert pages - {(index.parent / target).resolve() for target in linked} - {index.resolve()} == set()
