"""The policy on a GPU: whole models of transformers, CUDA graphs, torch.compile, threads, record and verify."""

from __future__ import annotations

import json
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from detinfer import bits
from detinfer.bench import model_cuda
from detinfer.cli import run
from detinfer.errors import RefusedError
from detinfer.policy import Accepted, Policy, deterministic
from detinfer.policy.state import STATE

pytestmark = pytest.mark.gpu

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Values of both signs with spread exponents, the first and the last column large and each other's negative."""
    draw = torch.Generator("cuda").manual_seed(seed)
    values = torch.randint(-127, 128, shape, generator=draw, device="cuda").float()
    values = torch.ldexp(values, torch.randint(-12, -3, shape, generator=draw, device="cuda"))
    values[..., 0], values[..., -1] = 300.0, -300.0
    return values.to(dtype)


def model(kind: str) -> Any:
    """A small model of transformers with drawn weights."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    made = getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16().cuda().eval().requires_grad_(False)
    for number, weight in enumerate(made.parameters()):
        weight.copy_(drawn(number, *weight.shape) / 100 + (weight.dim() == 1))
    return made


def uses(made: Any) -> None:
    """What a program does with a model: prefill, decode, a static cache, padding on the left, generate."""
    from transformers import StaticCache

    ids = torch.arange(3 * 40, device="cuda").view(3, 40)
    cache = made(input_ids=ids, use_cache=True).past_key_values
    made(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    slots = StaticCache(config=made.config, max_cache_len=64)
    made(input_ids=ids, past_key_values=slots, use_cache=True)
    made(input_ids=ids[:, :1], past_key_values=slots, use_cache=True)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    made(input_ids=ids, attention_mask=mask, use_cache=True)
    made.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_nothing_that_a_model_calls_is_uncovered(kind: str, mode: type[AbstractContextManager[Any]]) -> None:
    """Every operation is decided by a proof, or moves bytes, or is exact; products and attention run on our paths."""
    made = model(kind)
    with mode(), deterministic("batch") as active:
        uses(made)
    assert all(isinstance(decision, Accepted) for decision in active.decisions.values())
    paths = {op: decision.path for (op, _), decision in active.decisions.items()}
    assert paths["aten::linear on cuda"] == "cuda/matmul"
    assert paths["aten::scaled_dot_product_attention on cuda"] == "cuda/attention"
    assert paths["aten::mean.dim on cuda"] == "cuda/rows"
    assert paths["aten::index_copy_ on cuda"] == "torch/cuda"
    computing = [d for d in active.decisions.values() if isinstance(d, Accepted) and d.proof is not None]
    assert {d.proof.cases > 0 for d in computing if d.proof} == {True}


def test_rows_alone_in_batches_and_step_by_step() -> None:
    """The bytes of logits; without the policy some of the same comparisons differ, so that they can."""
    made = model_cuda.build("qwen3-small")
    found = list(model_cuda.checks(made))
    assert [check.differ for check in found] == [0, 0, 0]
    assert [check.rows for check in found] == [8, 8, 8]
    assert sum(check.differ_without for check in found) > 0


def test_refusals_name_the_operation_and_the_device() -> None:
    x = drawn(1, 4, 64)
    with deterministic("batch"):
        with pytest.raises(RefusedError, match=r"aten::cumsum on cuda, bfloat16 is refused: it is a running sum"):
            x.cumsum(-1)
        with pytest.raises(RefusedError, match=r"float64 has no canonical order on CUDA"):
            x.double() @ x.double().t()
        with pytest.raises(RefusedError, match=r"draws random numbers"):
            torch.rand_like(x)
    with deterministic(Policy(allow=("aten::cumsum",))) as active:
        x.cumsum(-1)
        assert active.decisions["aten::cumsum on cuda", (torch.bfloat16,)].path == "torch/cuda"
    assert (x.double() @ x.double().t()).dtype is torch.float64  # everything is as before
    assert STATE._installed is None


def test_scalars_and_indices_may_be_on_the_cpu() -> None:
    x = drawn(2, 8, 64)
    with deterministic("batch") as active:
        picked = x[torch.tensor([3, 1])]
        scaled = x * torch.tensor(2.0)
        back = x.cpu()
    assert bits.rows_equal(picked, torch.stack([x[3], x[1]])).all()
    assert bits.rows_equal(scaled, (x.float() * 2).bfloat16()).all()
    assert bits.rows_equal(back, x).all()
    assert {op for op, _ in active.decisions} >= {"aten::index.Tensor on cuda", "aten::mul.Tensor on cuda"}


def test_a_capture_holds_no_proof_and_replays_the_same_bytes() -> None:
    """The first use of an operation and dtype inside a capture is refused; after a run before it, the graph has the bytes."""
    x, w = drawn(3, 5, 512), drawn(4, 256, 512)

    def step() -> torch.Tensor:
        h = F.linear(x, w)
        return torch.softmax(h.float(), -1) * h.float().mean(-1, keepdim=True)

    with deterministic("batch", uncovered="trust"):
        expected = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
    got.zero_()
    graph.replay()  # also after the block
    assert bits.rows_equal(got, expected).all()
    from detinfer.policy import proofs

    kept = proofs._made.copy()
    proofs._made.clear()
    try:
        with deterministic("batch", uncovered="trust"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.view(torch.int16).bitwise_not()  # torch warns of a graph that holds nothing
            with pytest.raises(RefusedError, match="before the capture"):
                step()
    finally:
        proofs._made.update(kept)


def test_compiled_functions_run_as_they_were_written() -> None:
    """Inductor's fused kernels would pass the overrides by: inside a block they do not run."""
    x, w = drawn(5, 7, 256), drawn(6, 128, 256)

    def step(x: torch.Tensor) -> torch.Tensor:
        return F.silu(F.linear(x, w)).float().mean(-1)

    compiled = torch.compile(step)
    with deterministic("batch"):
        expected = step(x)
        got = compiled(x)
        alone = compiled(x[3:4])
    assert bits.rows_equal(got, expected).all()
    assert bits.rows_equal(alone, expected[3:4]).all()


def test_threads_have_blocks_of_their_own() -> None:
    x, w = drawn(7, 9, 512), drawn(8, 64, 512)
    with deterministic("batch"):
        expected = F.linear(x, w)
    torch.cuda.synchronize()
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for _ in range(20):
                found[number] = F.linear(x[number : number + 1], w)
            torch.cuda.current_stream().synchronize()

    with deterministic("batch"):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, got in found.items():
        assert bits.rows_equal(got, expected[number : number + 1]).all()
    assert len(found) == 4


def test_record_and_verify_on_a_gpu(tmp_path: Path) -> None:
    """The golden says where it was recorded, verify goes there by itself, and on a CPU the golden is stale."""
    golden, report = tmp_path / "golden", tmp_path / "result.json"
    short = ["--n-prompts", "2", "--length", "40", "--decode-steps", "2", "--dtype", "bfloat16"]
    assert run(["record", "builtin:dense", "-o", str(golden), "--device", "cuda", *short]) == 0
    assert run(["verify", str(golden), "--n-trials", "3", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["invariance"]["verdict"] == "same" and found["golden"]["verdict"] == "same"
    assert {d["path"] for d in found["decisions"] if d["op"] == "aten::linear"} <= {"cuda/matmul"}
    run(["verify", str(golden), "--n-trials", "3", "--device", "cpu", "--json", str(report)])
    assert json.loads(report.read_text())["golden"]["verdict"] == "stale"
