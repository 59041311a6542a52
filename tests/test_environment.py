"""The environment: what makes a golden stale, what does not, and strict reading."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import environment
from detinfer.environment import STALE_FIELDS, STALE_REASONS, Environment, differences
from detinfer.errors import GoldenError

HERE = environment.capture(native="avx2")


def test_capture_repeats_itself_and_reads_back() -> None:
    assert environment.capture(native="avx2") == HERE
    assert Environment.from_json(json.loads(json.dumps(HERE.to_json()))) == HERE
    assert HERE.torch == torch.__version__
    assert HERE.cpu_capability == torch.backends.cpu.get_cpu_capability()
    assert HERE.native == "avx2"
    assert HERE.cpu != "unknown"
    if "oneDNN" in torch.__config__.show() or "MKL-DNN" in torch.__config__.show():
        assert HERE.onednn != "none"


def test_every_stale_field_is_a_field_with_a_reason_and_shows() -> None:
    names = {field.name for field in fields(Environment)}
    assert set(STALE_FIELDS) <= names
    assert all(STALE_REASONS[name] for name in STALE_FIELDS)
    for name in STALE_FIELDS:
        value: Any = getattr(HERE, name)
        if isinstance(value, dict):
            other, wanted = {**value, "X": "1"}, ((f"{name}.X", "unset", "1"),)
        elif isinstance(value, tuple):
            other, wanted = (*value, "zzz"), ((name, " ".join(value), " ".join((*value, "zzz"))),)
        else:
            other, wanted = value + "x", ((name, value, value + "x"),)
        changed = replace(HERE, **{name: other})
        assert differences(HERE, changed) == wanted
        assert differences(HERE, changed, portable=True) == ()
    assert differences(HERE, HERE) == ()


@pytest.mark.parametrize("name", ["python", "detinfer", "native"])
def test_fields_that_excuse_nothing(name: str) -> None:
    assert differences(HERE, replace(HERE, **{name: "another"})) == ()
    assert name not in STALE_FIELDS


def captured(variables: dict[str, str], before: str = "") -> Environment:
    code = (
        f"import json, torch\n{before}\nfrom detinfer import environment as e\nprint(json.dumps(e.capture().to_json()))"
    )
    clean = {k: v for k, v in os.environ.items() if k not in (*environment.VARIABLES, "ATEN_CPU_CAPABILITY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **variables}, capture_output=True, text=True, check=True
    )
    return Environment.from_json(json.loads(done.stdout))


def test_another_process_differs_only_by_what_picks_kernels() -> None:
    plain = captured({})
    one_thread = captured({"OMP_NUM_THREADS": "1", "HOSTNAME": "elsewhere"}, "torch.set_num_threads(1)")
    assert one_thread == plain
    held = captured({"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"})
    found = {name: (a, b) for name, a, b in differences(plain, held)}
    assert found.pop("variables.MKL_CBWR") == ("unset", "COMPATIBLE")
    if plain.cpu_capability != held.cpu_capability:  # equal on a CPU whose only capability is the default one
        assert found.pop("cpu_capability")[0] == plain.cpu_capability
    assert found == {}
    flags = captured({}, "torch.set_float32_matmul_precision('medium'); torch.set_flush_denormal(True)")
    assert {name for name, _, _ in differences(plain, flags)} <= {
        "flags.float32_matmul_precision",
        "flags.flush_denormal",
    }
    assert ("flags.float32_matmul_precision", "highest", "medium") in differences(plain, flags)


def test_a_cpu_has_no_gpu_and_a_gpu_is_another_environment() -> None:
    """The entry is left out where it is empty, so that manifests of CPU runs have no such key; read back, it is empty."""
    assert HERE.gpu == {}
    assert "gpu" not in HERE.to_json()
    there = replace(HERE, gpu={"name": "NVIDIA H200", "driver": "580.1"})
    assert Environment.from_json(json.loads(json.dumps(there.to_json()))) == there
    assert differences(there, replace(there, gpu={"name": "NVIDIA H200", "driver": "580.2"})) == (
        ("gpu.driver", "580.1", "580.2"),
    )
    assert {name for name, _, _ in differences(HERE, there)} == {"gpu.name", "gpu.driver"}


@pytest.mark.gpu
def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "1024")
    found = environment.capture(device="cuda").gpu
    assert found["name"] == torch.cuda.get_device_name()
    assert found["CUBLASLT_WORKSPACE_SIZE"] == "1024"
    assert "unknown" not in found.values()


def test_libraries_are_those_asked_for() -> None:
    assert environment.capture(libraries=()).libraries == {}
    assert set(environment.capture(libraries=("numpy", "no-such-package")).libraries) == {"numpy"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"surprise": "1"}, "unknown key 'surprise'"),
        ({"torch": None}, "torch"),
        ({"cpu_features": "avx"}, "cpu_features"),
        ({"flags": {"a": 1}}, "flags"),
    ],
)
def test_reading_is_strict(change: dict[str, Any], word: str) -> None:
    with pytest.raises(GoldenError, match=word):
        Environment.from_json({**HERE.to_json(), **change})


def test_a_missing_key_is_named() -> None:
    data = HERE.to_json()
    del data["libc"]
    with pytest.raises(GoldenError, match=r"manifest.json: environment: missing key 'libc'"):
        Environment.from_json(data, "manifest.json: environment")
    with pytest.raises(GoldenError, match="expected an object"):
        Environment.from_json([])


def test_the_page_on_goldens_names_every_field() -> None:
    page = (Path(__file__).parents[1] / "docs/concepts/goldens.md").read_text(encoding="utf-8")
    listed = page[page.index("## What makes a golden stale") :].split("\n## ")[0]
    table = set(re.findall(r"`([a-z_]+)`", "".join(line for line in listed.splitlines() if line.startswith("| `"))))
    assert set(STALE_FIELDS) <= table <= set(STALE_FIELDS) | {name.lower() for name in environment.VARIABLES}
    rest = {field.name for field in fields(Environment)} - set(STALE_FIELDS)
    assert rest <= set(re.findall(r"`([a-z_]+)`", listed))
