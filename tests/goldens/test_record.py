"""Recording streams: a layer's tensors are on the disk before the next layer runs, whatever the golden's size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from detinfer import cli
from detinfer.goldens import format as formats

HERE = Path(__file__).parent

WIDE = """
import json, resource, sys
import torch
from torch import nn
from detinfer import cli

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.SiLU()) for _ in range(40))

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(x) + 0.01 * number
        return x

def make():
    return Wide(), [torch.linspace(-1, 1, 1 << 20).reshape(1, 1024, 1024)]

if __name__ == "__main__":
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = cli.run(["record", "wide:make", "-o", "golden", "--shard-mb", "40", *sys.argv[1:]])
    print(json.dumps([code, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def test_memory_does_not_grow_with_the_golden(tmp_path: Path) -> None:
    """A golden of 500 MB, cut into files of 40, is recorded in a third of its size, and read back whole."""
    (tmp_path / "wide.py").write_text(WIDE)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *(part for part in sys.path if part)])}
    command = [sys.executable, "wide.py"]
    ended = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    code, before, most = json.loads(ended.stdout.splitlines()[-1])
    assert code == 0, ended.stderr
    files = {file.name: file.stat().st_size for file in (tmp_path / "golden").iterdir()}
    stored = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    assert stored > 450e6
    assert len(files) > 4
    assert max(size for name, size in files.items() if name.endswith(".safetensors")) < 45e6
    assert (most - before) * 1024 < stored / 3, (before, most, stored)
    assert cli.run(["golden", "check", str(tmp_path / "golden")]) == 0


def test_tensors_are_written_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the last layer of the first run ends, what the first layer gave is on the disk; an interruption leaves nothing."""
    monkeypatch.syspath_prepend(str(HERE))
    seen: list[list[str]] = []
    real = formats.GoldenWriter.add

    def add(self: formats.GoldenWriter, t: object, store: bool) -> str:
        seen.append([file.name for folder in tmp_path.glob(".golden.partial-*") for file in folder.iterdir()])
        if len(seen) == 20:
            raise KeyboardInterrupt
        return real(self, t, store)  # type: ignore[arg-type]

    monkeypatch.setattr(formats.GoldenWriter, "add", add)
    command = ["record", "builtin:dense", "-o", str(tmp_path / "golden"), "--n-prompts", "1"]
    monkeypatch.setattr(formats, "SHARD_BYTES", 3000)
    assert cli.run(command) == 130
    assert any("tensors-00002.safetensors" in names for names in seen)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensors", ["full", "slice", "none"])
def test_shards_change_no_content(tensors: str, tmp_path: Path) -> None:
    """The manifests of a golden of one file and of one of many differ in the files and the digest alone."""
    command = ["record", "builtin:dense", "--n-prompts", "2", "--tensors", tensors]
    found = []
    for name, more in (("one", ()), ("many", ("--shard-mb", "1"))):
        assert cli.run([*command, "-o", str(tmp_path / name), *more]) == 0
        held = json.loads((tmp_path / name / "manifest.json").read_text())
        held["command"] = re.sub(r" --shard-mb \d+", "", held["command"])
        found.append({key: value for key, value in held.items() if key not in ("files", "digest")})
        assert cli.run(["verify", str(tmp_path / name), "--n-trials", "2", "--axes", "batch"]) == 0
    assert found[0] == found[1]


def test_a_size_that_makes_no_sense(tmp_path: Path) -> None:
    """Exit 2."""
    assert cli.run(["record", "builtin:dense", "-o", str(tmp_path / "g"), "--shard-mb", "0"]) == 2
