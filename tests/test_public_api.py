"""The public surface changes on purpose only: names, verbs, options and exit codes are listed here."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import detinfer
from detinfer import errors
from detinfer.cli import cli

NAMES = {
    "Accepted",
    "Active",
    "Decision",
    "DetinferError",
    "Guarantee",
    "Policy",
    "Proof",
    "Refused",
    "RefusedError",
    "deterministic",
    "explain",
}
OPTIONS = {
    "bench attention": {"--device", "--dtype", "--json", "--repeats", "--threads"},
    "bench elements": {"--dtype", "--only", "--repeats", "--threads"},
    "bench collectives": {"--dtype", "--json", "--ranks", "--seconds", "--sizes"},
    "bench collectives-cuda": {"--json", "--plot", "--ranks", "--table", "--tune"},
    "bench experts": {"--json", "--repeats", "--tokens"},
    "bench compute": {"--dtype", "--json", "--repeats", "--rows"},
    "bench linear": {"--dtype", "--repeats", "--rows", "--threads"},
    "bench moe": {"--ranks", "--repeats", "--rows"},
    "bench rows": {"--dtype", "--json", "--repeats"},
    "bench model": {"--device", "--dtype", "--json", "--repeats", "--threads", "--tp"},
    "env": {"--engine", "--json"},
    "eval diff": set(),
    "eval run": {"--allow", "--policy", "--repeat", "--report", "--sample", "--seed", "--uncovered", "--unobserved"},
    "fingerprint explain": set(),
    "fingerprint show": {"--allow", "--json", "--policy"},
    "policy explain": {"--allow", "--dtype", "--json", "--policy"},
    "prove": {"--dtype", "--force", "--json", "--shape"},
    "record": {
        "--allow",
        "--decode-steps",
        "--device",
        "--dtype",
        "--force",
        "--groups",
        "--layers",
        "--length",
        "--n-prompts",
        "--output",
        "--name",
        "--goldens",
        "--policy",
        "--prompts",
        "--reason",
        "--reductions",
        "--rank-timeout",
        "--seed",
        "--shard-mb",
        "--tensors",
        "--tp",
    },
    "run": {"--allow", "--engine", "--policy", "--report", "--uncovered"},
    "diff": {"--json"},
    "golden accept": {"--in-ci", "--reason"},
    "golden check": set(),
    "golden fetch": {"--force"},
    "golden ls": {"--json"},
    "golden prune": {"--delete"},
    "golden push": {"--force"},
    "golden reject": set(),
    "golden show": set(),
    "locate": {"--control", "--device", "--golden", "--rank-timeout", "--script", "--target", "--tp"},
    "verify-server": {
        "--api",
        "--api-key-env",
        "--batch-sizes",
        "--body",
        "--concurrency",
        "--control-body",
        "--control-url",
        "--fail-fast",
        "--frequency-penalty",
        "--host",
        "--json",
        "--github",
        "--html",
        "--junit-xml",
        "--max-new-tokens",
        "--max-token-id",
        "--min-p",
        "--model",
        "--n-start",
        "--n-trials",
        "--only-trial",
        "--port",
        "--prefix-lengths",
        "--presence-penalty",
        "--retries",
        "--return-logprob",
        "--sampling-seed",
        "--seed",
        "--stream",
        "--temperature",
        "--test-mode",
        "--timeout",
        "--top-k",
        "--top-p",
    },
    "verify": {
        "--batch-sizes",
        "--control",
        "--axes",
        "--device",
        "--fail-fast",
        "--github",
        "--html",
        "--jobs",
        "--json",
        "--junit-xml",
        "--layers",
        "--n-trials",
        "--only-trial",
        "--pending",
        "--reductions",
        "--rank-timeout",
        "--resume",
        "--seed",
        "--target",
        "--tp",
    },
}


def test_names() -> None:
    """`from detinfer import *` gives these names, each exists, and the reference lists each."""
    assert set(detinfer.__all__) == NAMES
    assert all(getattr(detinfer, name) is not None for name in NAMES)
    page = (Path(__file__).parents[1] / "docs/reference/python.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == NAMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Names are loaded when first used; one that does not exist says so like any other."""
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = detinfer.no_such_name


def test_import_is_light() -> None:
    """Importing detinfer imports neither torch nor numpy."""
    code = "import sys, detinfer; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def verbs(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that runs something, by its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, f"{before}{name} ")
        else:
            yield before + name, command


def test_verbs_and_options() -> None:
    """Every verb has the options listed above, and there is no other verb."""
    found = {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        for name, command in verbs(cli)
    }
    assert found == OPTIONS


def test_exit_codes() -> None:
    """Exit codes are part of the interface: scripts read them."""
    codes = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert codes == {
        "EXIT_SAME": 0,
        "EXIT_DIVERGED": 1,
        "EXIT_USAGE": 2,
        "EXIT_INTERNAL": 3,
        "EXIT_GOLDEN": 4,
        "EXIT_VACUOUS": 5,
        "EXIT_INFRASTRUCTURE": 6,
        "EXIT_INTERRUPTED": 130,
    }
