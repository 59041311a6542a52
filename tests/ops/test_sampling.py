"""Sampling: the reference's token on CPU and CUDA, wherever a row lies, and the probabilities that were asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import detinfer
from detinfer.errors import UnsupportedDtype, UsageError
from detinfer.ops.evidence import to_values
from detinfer.ops.sampling import SeededSampler, sample
from detinfer.reference import elementwise
from detinfer.reference import sampling as reference

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
WIDTHS = (1, 15, 49, 77, 100, 1000, 2890)
ROWS = 9
LIMITS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0},
)


def logits(n: int, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> torch.Tensor:
    """[rows, n]: many ties, a spread of 12, every eleventh token masked."""
    random = np.random.default_rng(n)
    values = random.integers(-48, 48, (rows, n)).astype(np.float32) / 8
    values[:, 10::11] = -np.inf
    return torch.from_numpy(values).to(dtype)


def test_philox_is_the_published_generator() -> None:
    """The known answers of Philox4x32-10 that its authors publish with it (Random123, kat_vectors)."""
    ones = 0xFFFFFFFF
    known = (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    )
    for counter, key, words in known:
        assert tuple(int(word) for word in reference.philox(counter, key)) == words


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", WIDTHS)
def test_the_references_token(n: int, device: str) -> None:
    """Every row, every kind of limit, seeds and positions of 64 bits; another position gives other tokens."""
    x = logits(n)
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 77, 78, 2**32, 5]
    positions = [0, 2**32, 3, 2**63 - 1, 4, 5, 6, 7, 8]
    for limits in LIMITS:
        got = sample(x.to(device), seeds, positions, **limits).tolist()
        assert got == [
            reference.sample(row, seed, position, **limits)
            for row, seed, position in zip(x.numpy(), seeds, positions, strict=True)
        ], limits
    if n >= 49:
        moved = sample(x.to(device), seeds, [p - 1 if p else 9 for p in positions]).tolist()
        assert moved != sample(x.to(device), seeds, positions).tolist(), "the position would not matter"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_widened(dtype: torch.dtype, device: str) -> None:
    """The token of the same values in fp32."""
    x = logits(1000, dtype)
    got = sample(x.to(device), 3, 4, top_p=0.9).tolist()
    assert got == [reference.sample(row, 3, 4, top_p=0.9) for row in to_values(x)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_see_its_batch(device: str) -> None:
    """Alone, in any order, among others: the same tokens; by the row's number as its seed they would differ."""
    x = logits(2890, rows=33).to(device)
    seeds = torch.arange(100, 133, device=device)
    limits = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}
    together = sample(x, seeds, 7, **limits)
    order = torch.from_numpy(np.random.default_rng(0).permutation(33)).to(device)
    assert sample(x[order], seeds[order], 7, **limits).tolist() == together[order].tolist()
    assert [int(sample(x[i : i + 1], seeds[i : i + 1], 7, **limits)) for i in range(33)] == together.tolist()
    assert sample(x[order], seeds, 7, **limits).tolist() != together[order].tolist(), "the seed would not matter"


@pytest.mark.parametrize("device", DEVICES)
def test_limits_of_each_row(device: str) -> None:
    """One parameter for each row is each row's own, off for one and on for another."""
    x = logits(100)
    limits = {"temperature": [0.0, 1, 2, 1, 0.5, 1, 1, 0, 1], "top_k": [0, 3, 0, 1, 9, 0, 0, 0, 0]}
    limits |= {"top_p": [1, 1, 0.5, 1, 0.9, 0.1, 0.0, 1, 1], "min_p": [0, 0, 0, 0.3, 0, 0, 0, 0, 1.0]}
    tensors = {
        "temperature": torch.tensor(limits["temperature"], device=device),
        "top_k": torch.tensor(limits["top_k"], device=device),
        "top_p": torch.tensor(limits["top_p"], dtype=torch.float64, device=device),
        "min_p": torch.tensor(limits["min_p"], device=device),
    }
    for given in (limits, tensors):
        got = sample(x.to(device), list(range(ROWS)), 2, **given).tolist()
        assert got == [
            reference.sample(row, i, 2, **{name: values[i] for name, values in limits.items()})
            for i, row in enumerate(x.numpy())
        ]


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lower_number(device: str) -> None:
    """All tokens alike: top-k and top-p keep the first ones, greedy takes the first."""
    x = torch.zeros(200, 64, device=device)
    seeds = torch.arange(200, device=device)
    assert set(sample(x, seeds, 0, top_k=4).tolist()) == {0, 1, 2, 3}
    assert set(sample(x, seeds, 0, top_p=0.125).tolist()) == set(range(8))
    assert set(sample(x, seeds, 0, top_p=0.0).tolist()) == {0}
    assert set(sample(x, seeds, 0, temperature=0).tolist()) == {0}


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_draw(device: str) -> None:
    """NaN anywhere, +Inf, or all masked: -1, and the rows beside it are as ever."""
    x = logits(77)
    x[0, 5], x[1], x[2, 76] = torch.nan, -torch.inf, torch.inf
    for temperature in (1.0, 0.0):
        got = sample(x.to(device), 1, 1, temperature=temperature).tolist()
        assert got[:3] == [-1, -1, -1]
        assert got[3:] == [reference.sample(row, 1, 1, temperature) for row in x[3:].numpy()]


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_as_frequent_as_likely(device: str) -> None:
    """20,000 draws at 20,000 positions: chi-squared of 10 tokens within 9 +- 5 standard deviations, and so for seeds."""
    n, draws = 10, 20000
    row = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0, 1.5, 0.25, -0.5, 0.75, 1.75], device=device)
    exact = torch.softmax(row.double(), 0).cpu().numpy()
    numbers = torch.arange(draws, device=device)
    for seeds, positions in ((5, numbers), (numbers, 5)):
        tokens = sample(row.expand(draws, n), seeds, positions).cpu().numpy()
        count = np.bincount(tokens, minlength=n)
        squared = float((((count - exact * draws) ** 2) / (exact * draws)).sum())
        assert abs(squared - (n - 1)) < 5 * (2 * (n - 1)) ** 0.5, squared


def test_noise_spreads_over_its_range() -> None:
    """The uniform numbers of one request fill (0, 1); neither end is reached."""
    u = reference.uniform(1234, 56, 100000)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    count = np.histogram(u, bins=20, range=(0, 1))[0]
    assert abs(float(((count - 5000) ** 2 / 5000).sum()) - 19) < 5 * 38**0.5
    ends = np.array([0.5, 2.0**52 - 0.5]) * 2.0**-52
    assert np.isfinite(-elementwise.log_(-elementwise.log_(ends))).all()


def test_levels_agree(level: str, threads: int) -> None:
    """Every instruction set, one thread and two."""
    x = logits(1000, rows=5)
    assert sample(x, 9, 9).tolist() == [reference.sample(row, 9, 9) for row in x.numpy()], level


def test_sampler_in_a_generation() -> None:
    """Scores with one token left; the position counts from the first new token, whatever the padding; `start` goes on."""
    x = logits(100, rows=2)
    for width in (4, 9):
        sampler = SeededSampler([3, 8], temperature=0.8)
        for step in range(3):
            scores = sampler(torch.zeros(2, width + step, dtype=torch.int64), x)
            tokens = sample(x, [3, 8], step, temperature=0.8)
            assert scores.argmax(-1).tolist() == tokens.tolist()
            assert (scores > -torch.inf).sum(-1).tolist() == [1, 1]
    continued = SeededSampler([3, 8], temperature=0.8, start=[2, 5])(torch.zeros(2, 4, dtype=torch.int64), x)
    assert continued.argmax(-1).tolist() == sample(x, [3, 8], [2, 5], temperature=0.8).tolist()
    with pytest.raises(UsageError, match="nothing can be drawn"):
        sampler(torch.zeros(2, 9, dtype=torch.int64), torch.full((2, 5), torch.nan))


def test_generate_under_a_policy() -> None:
    """transformers' generate: a request's tokens alone, in a batch and behind padding; another seed, other tokens."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 300, (3, 7))

    def generate(ids: torch.Tensor, seeds: list[int], padding: int = 0) -> torch.Tensor:
        mask = torch.ones_like(ids)
        ids, mask = (torch.nn.functional.pad(v, (padding, 0)) for v in (ids, mask))
        sampler = SeededSampler(seeds, temperature=0.8, top_p=0.95)
        length = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
        with detinfer.deterministic("batch"), torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, logits_processor=[sampler], **length
            )
        tokens: torch.Tensor = out[:, -6:]
        return tokens

    together = generate(ids, [5, 6, 7])
    for i in range(3):
        assert generate(ids[i : i + 1], [5 + i]).tolist() == together[i : i + 1].tolist()
    assert generate(ids, [5, 6, 7], padding=4).tolist() == together.tolist()
    assert generate(ids, [6, 7, 5]).tolist() != together.tolist()


def test_bad_input_is_refused() -> None:
    """Shapes, ranges, dtypes; nothing is drawn."""
    x = logits(15)
    with pytest.raises(UsageError, match=r"logits are \[15\]"):
        sample(x[0], 1, 1)
    with pytest.raises(UsageError, match=r"seeds is \[3\] for 9 rows"):
        sample(x, [1, 2, 3], 1)
    with pytest.raises(UsageError, match=r"top_p is 1\.5"):
        sample(x, 1, 1, top_p=1.5)
    with pytest.raises(UsageError, match="temperature is nan"):
        sample(x, 1, 1, temperature=float("nan"))
    with pytest.raises(UsageError, match="64-bit"):
        sample(x, 2**64, 1)
    with pytest.raises(UnsupportedDtype, match="float64"):
        sample(x.double(), 1, 1)
    assert sample(x[:0], 1, 1).shape == (0,)


@pytest.mark.gpu
def test_a_whole_vocabulary_in_a_cuda_graph() -> None:
    """152064 tokens, 64 rows: the CPU's tokens, captured and replayed with other logits."""
    x = logits(152064, rows=64)
    seeds, positions = torch.arange(64), torch.full((64,), 11)
    expected = sample(x, seeds, positions, top_k=50)
    on_gpu = x.cuda(), seeds.cuda(), positions.cuda(), torch.full((64,), 50, device="cuda")
    assert sample(*on_gpu[:3], top_k=on_gpu[3]).tolist() == expected.tolist()
    static = torch.zeros_like(on_gpu[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(static, *on_gpu[1:3])
    static.copy_(on_gpu[0])
    graph.replay()
    assert tokens.tolist() == sample(x, seeds, positions).tolist()
