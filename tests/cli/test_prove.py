"""``detinfer prove``: which shapes it measures, what it refuses, and that what it keeps is used and changes no byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from detinfer import cli
from detinfer.bits import first_mismatch
from detinfer.errors import TargetError
from detinfer.models import linear_shapes
from detinfer.models.linear_shapes import LinearShape


def test_each_shape_of_a_module_once() -> None:
    layers = [nn.Linear(8, 4), nn.Linear(8, 4, bias=False), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8).half())]
    found = linear_shapes.of_module(nn.ModuleList(layers))
    single, half = torch.float32, torch.float16
    assert found == [LinearShape(8, 4, single, True), LinearShape(8, 4, single, False), LinearShape(4, 8, half, True)]
    assert linear_shapes.of_module(layers[2], torch.bfloat16)[1].dtype is torch.bfloat16


def test_the_shapes_of_transformers_need_no_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, dtype=torch.bfloat16,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    found = linear_shapes.of_target(f"hf:{tmp_path}")
    assert {(one.k, one.n) for one in found} == {(32, 32), (32, 16), (32, 80), (80, 32), (32, 96)}
    assert {(one.dtype, one.bias) for one in found} == {(torch.bfloat16, False)}
    with pytest.raises(TargetError, match="cannot be built from its configuration"):
        linear_shapes.of_target(f"hf:{tmp_path / 'nothing'}")


def test_a_target_without_linear_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "without_linear.py").write_text(
        "import torch\ndef make():\n    return torch.nn.LayerNorm(4), [torch.ones(1, 4)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetError, match=r"no torch\.nn\.Linear layer"):
        linear_shapes.of_target("without_linear:make")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a target"),
        (["--shape", "4096"], "K,N such as"),
        (["--shape", "8,8", "--dtype", "int8"], "one of float32"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["prove", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["prove", "--shape", "64,64"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_what_is_kept_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detinfer.ops import matmul_store, matmul_table
    from detinfer.ops.matmul_cuda import linear
    from detinfer.ops.matmul_cuda_proof import adversarial, operands

    monkeypatch.setenv("DETINFER_CACHE", str(tmp_path))
    matmul_store.state.cache_clear()
    matmul_table.forget()
    try:
        x, w = operands(300, 512, 256, torch.bfloat16, torch.device("cuda"))
        bias = adversarial(1, 512, torch.bfloat16, x.device, 5)[0]
        expected = linear(x, w, bias, path="reference")
        assert first_mismatch(linear(x, w, path="reference"), expected) is not None
        report = tmp_path / "result.json"
        assert cli.run(["prove", "--shape", "256,512,bias", "--json", str(report)]) == 0
        assert json.loads(report.read_text())["shapes"][0]["failed"] == []
        matmul_table.forget()
        matmul_store.state.cache_clear()
        for rows in (1, 17, 300):
            assert first_mismatch(linear(x[:rows], w, bias), expected[:rows]) is None
        assert [key.n for key in matmul_table.tables()] == [512], "the first call reads the file"
    finally:
        matmul_store.state.cache_clear()
        matmul_table.forget()


def test_the_report_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command around a proof, which stands in here for a GPU's: what it asks for, prints, writes and keeps."""
    from detinfer.ops import matmul_cuda_proof, matmul_store, matmul_table
    from detinfer.ops.matmul_table import Choice, Key, Table

    asked: list[tuple[int, int, torch.dtype, bool]] = []

    def measured(n: int, k: int, dtype: torch.dtype, device: torch.device, *, bias: bool) -> object:
        asked.append((k, n, dtype, bias))
        lt = Choice("cublaslt_no_split", -1, bytes(64))
        choices = (Choice("skinny", 0), Choice("skinny", 2), lt)
        table = Table(Key(n, k, dtype, k, bias, 0), (1, 8, 16384), choices, 1024, (1024,), 4321 * n)
        matmul_table.use([table])
        return matmul_cuda_proof.Measured(table, {}, ("cuBLASLt gives other bytes at 3 rows",) if bias else ())

    monkeypatch.setenv("DETINFER_CACHE", str(tmp_path))
    monkeypatch.setattr(matmul_store, "fingerprint", lambda device: {"name": "a GPU"})
    monkeypatch.setattr(matmul_cuda_proof, "prove_shape", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    matmul_table.forget()
    matmul_store.state.cache_clear()
    report = tmp_path / "result.json"
    try:
        words = ["prove", "--shape", "64,128", "--shape", "128, 64, bias", "--dtype", "float16", "--json", str(report)]
        assert cli.run(words) == 0
        assert asked == [(64, 128, torch.float16, False), (128, 64, torch.float16, True)]
        shown = capsys.readouterr()
        assert "not used: cuBLASLt gives other bytes at 3 rows" in shown.out
        assert "64 -> 128" in shown.out and str(tmp_path / "proofs") in shown.err
        shapes = json.loads(report.read_text())["shapes"]
        assert shapes[0]["paths"] == [[8, "skinny"], [16384, "cublaslt_no_split"]]
        assert [one["compared"] for one in shapes] == [4321 * 128, 4321 * 64]
        kept = matmul_store.read(tmp_path / "proofs" / matmul_store.FILE, {"name": "a GPU"}, 0)
        assert isinstance(kept, matmul_store.Read) and {table.key.n for table in kept.tables} == {64, 128}
    finally:
        matmul_table.forget()
        matmul_store.state.cache_clear()
