"""``--tp`` of transformers models: cut by their own plan, compared between ranks and with another number of ranks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
HERE = Path(__file__).parent
sys.path.append(str(HERE))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    import tp_models

    return tp_models.write(tmp_path_factory.mktemp("llama"))


def tp_axis(result: dict[str, Any]) -> dict[str, Any]:
    """What the axis ``tp`` found."""
    found: dict[str, Any] = next(axis for axis in result["invariance"]["axes"] if axis["name"] == "tp")
    return found


def test_three_ranks_under_batch_and_under_tp(target: str, tmp_path: Path) -> None:
    """Recorded on one rank, verified on three: under ``batch`` bits differ, which is no failure; under ``tp`` none does.

    Shares of every tensor are laid beside the whole: no output is left out.
    """
    import tp_models

    found = {}
    for scope, options in (("batch", ()), ("tp", ("--groups", "3"))):
        golden = tp_models.record(target, tmp_path / scope, "--policy", scope, *options)
        code, found[scope] = tp_models.verified(golden, tmp_path / f"{scope}.json", "--tp", "3")
        assert code == 0
    verdicts = {scope: result["golden"]["verdict"] for scope, result in found.items()}
    assert verdicts == {"batch": "not_promised", "tp": "same"}
    compared = {result["golden"]["rows_compared"] for result in found.values()}
    assert len(compared) == 1 and compared.pop() > 1000
    for scope, result in found.items():
        assert result["invariance"]["verdict"] == "same"
        assert not any("not compared" in reason for reason in result["golden"]["reasons"])
        consistency = result["consistency"]
        assert (consistency["verdict"], consistency["ranks"], consistency["differing"]) == ("same", 3, 0)
        assert consistency["tensors"] > 200
        assert (tp_axis(result)["rows_differing"] > 0) == (scope == "batch")
        seen = {probe["operation"]: probe["seen"] for probe in result["invariance"]["sensitivity"]}
        assert seen["detinfer::all_reduce"], "an order begun at another rank shows"
    first = found["batch"]["golden"]["first"]
    assert first["unit"] == "model.layers.0.self_attn.o_proj", "nothing before the first sum over ranks differs"
    cause = found["batch"]["golden"]["cause"]
    assert (cause["path"], cause["operation"], cause["inputs_differing"]) == (first["unit"], "detinfer::all_reduce", [])
    assert found["tp"]["golden"]["cause"] is None


def test_a_rank_of_torchrun_that_holds_other_bytes(target: str, tmp_path: Path) -> None:
    """Rank 2's first down projection differs by a bit: it is named, and no golden is written."""
    import tp_models

    golden = tmp_path / "golden"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    words = ["record", target, "-o", str(golden), *tp_models.SMALL, "--decode-steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "FAULT": "model.layers.0.mlp.down_proj"}
    command = [sys.executable, *torchrun, str(HERE / "odd_rank.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not golden.exists()
    assert "model.layers.0.mlp.down_proj: rank 2 holds other bytes than rank 0" in done.stderr


def test_what_cannot_be_cut_says_why(target: str) -> None:
    """Whole heads on every rank, as many on each; a model without a plan; groups that ranks cannot share."""
    import transformers
    import zoo

    from detinfer.errors import TargetError
    from detinfer.models import row_parallel, tensor_parallel

    config = transformers.AutoConfig.from_pretrained(target.removeprefix("hf:"))
    tensor_parallel.check(target, config, 3)
    with pytest.raises(TargetError, match=r"3 KV heads cannot be shared out evenly over 2 ranks.*--tp 3 would do"):
        tensor_parallel.check(target, config, 2)
    with pytest.raises(TargetError, match="no tensor-parallel plan for GPT2Config"):
        tensor_parallel.check("gpt2", zoo.build("gpt2", torch.float32).config, 2)
    with pytest.raises(TargetError, match="3 ranks cannot share 8 groups of a sum; 1, 2, 4, 8 can"):
        row_parallel.check(8, 3)


def test_where_shares_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers puts them on GPUs where there are any: as many as ranks; a built-in model's are on the CPU."""
    from detinfer.errors import TargetError
    from detinfer.models.ranks import Pretended
    from detinfer.models.targets import of_rank

    cpu, gpu, second = torch.device("cpu"), torch.device("cuda", 0), Pretended(1, 2)
    assert of_rank("smollm2", cpu, second) == cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert of_rank("smollm2", gpu, second) == torch.device("cuda", 1)
    assert of_rank("builtin:moe", cpu, second) == cpu and of_rank("builtin:moe", gpu, second) == torch.device("cuda", 1)
    for spec, where, ranks, says in (
        ("smollm2", cpu, second, "give --device cuda, or hide them"),
        ("smollm2", gpu, Pretended(1, 3), "3 ranks need as many GPUs, and torch sees 2"),
        ("builtin:moe", gpu, Pretended(1, 3), "3 ranks need as many GPUs, and torch sees 2"),
    ):
        with pytest.raises(TargetError, match=says):
            of_rank(spec, where, ranks)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_gpus(tmp_path: Path) -> None:
    """Heads for two ranks; recorded on one GPU and on two, verified on two: rows and ranks agree, and the file of two."""
    import tp_models

    spec, device, axes = "random:qwen3-small", ("--device", "cuda"), ("--axes", "batch,chunks,graph,streams")
    for ranks, verdict in (("2", "same"), ("1", "not_promised")):
        golden = tp_models.record(spec, tmp_path / ranks, "--tp", ranks, *device)
        code, result = tp_models.verified(golden, tmp_path / f"{ranks}.json", "--tp", "2", *device, *axes)
        assert code == 0
        ran = {axis["name"] for axis in result["invariance"]["axes"] if axis["comparisons"]}
        assert ran == {*axes[1].split(","), *(["tp"] if ranks == "1" else [])}
        assert result["golden"]["verdict"] == verdict
        assert result["invariance"]["verdict"] == result["consistency"]["verdict"] == "same"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_rank_whose_gpu_gives_up(tmp_path: Path) -> None:
    """Rank 1 reads a row that is not there: the run ends at once, with nothing written, and says why.

    Who ends rank 1 is a race: detinfer, where its next call meets the error, or the thread with which torch watches NCCL.
    """
    import tp_models

    golden = tmp_path / "golden"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["record", "random:qwen3-small", "-o", str(golden), "--device", "cuda", *tp_models.SMALL]
    more = {"PYTHONPATH": f"{HERE.parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    environment = {**os.environ, **more, "FAULT": "model.layers.0.mlp.down_proj", "LOST": "1"}
    command = [sys.executable, *torchrun, str(HERE / "odd_rank.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode != 0 and not golden.exists()
    ours = "error: rank 1: the GPU gave up in the middle of a kernel" in done.stderr
    torchs = "Signal 6 (SIGABRT)" in done.stderr and "device-side assert" in done.stderr
    assert "Assertion `srcIndex < srcSelectDimSize` failed" in done.stderr and (ours or torchs), done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("model", ["builtin:dense", "builtin:moe"])
def test_a_built_in_model_over_two_gpus(model: str, tmp_path: Path) -> None:
    """Its own sums go between the GPUs, proved there; nothing differs, between the ranks either."""
    import tp_models

    device = ("--device", "cuda")
    golden = tp_models.record(model, tmp_path / "golden", "--tp", "2", *device)
    code, result = tp_models.verified(golden, tmp_path / "result.json", "--tp", "2", *device)
    assert code == 0
    assert result["invariance"]["verdict"] == result["golden"]["verdict"] == result["consistency"]["verdict"] == "same"
    assert result["consistency"]["tensors"] > 0
    sums = [one for one in result["decisions"] if one["op"] == "detinfer::all_reduce"]
    assert sums and {one["path"] for one in sums} == {"cuda/all_reduce"} and all(one["proof"] for one in sums)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_scope_tp_on_gpus(tmp_path: Path) -> None:
    """Recorded on one GPU and verified on two, not a byte differs: the tree over ranks continues the one inside."""
    import tp_models

    device = ("--device", "cuda")
    golden = tp_models.record("random:qwen3-small", tmp_path / "golden", "--policy", "tp", *device)
    code, result = tp_models.verified(golden, tmp_path / "result.json", "--tp", "2", *device)
    assert code == 0 and result["golden"]["verdict"] == "same" and result["golden"]["rows_compared"] > 1000
    assert tp_axis(result)["rows_differing"] == 0 and result["consistency"]["verdict"] == "same"
