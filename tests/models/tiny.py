"""Small models for the tests of targets: factories, transformers folders and a GGUF, weights from integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

VOCABULARY = 300


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Multiples of 1/64 in [-1, 1)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-64, 64, shape)).float() / 64


class Net(nn.Module):
    """One linear layer and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5)
        self.layer.weight = nn.Parameter(draw(seed, 5, 7))
        self.layer.bias = nn.Parameter(draw(seed + 1, 5))
        self.register_buffer("scale", torch.tensor([1 + seed]))

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(x if other is None else x + other) * self.scale


def plain() -> Any:
    return Net(), [draw(1, 1, 7)]


def seeded(seed: int) -> Any:
    return Net(seed), [draw(seed, 1, 7)]


def drawn() -> Any:
    net = Net()
    nn.init.uniform_(net.layer.bias)
    return net, [draw(1, 1, 7)]


def kinds_of_requests() -> Any:
    return Net(), [draw(1, 1, 7), (draw(2, 1, 7), draw(3, 1, 7)), {"x": draw(4, 1, 7), "other": draw(5, 1, 7)}]


def mixed() -> Any:
    """Parameters in bf16, a table in fp32."""
    net = Net().bfloat16()
    net.scale = draw(6, 5)
    return net, [draw(1, 1, 7).bfloat16()]


def half_language_model() -> Any:
    """In bf16, with the tables of its rotary positions in fp32, as transformers loads it."""
    model = language_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def half() -> Any:
    return Net().half(), [draw(1, 1, 7).half()]


def double() -> Any:
    return Net().double(), [draw(1, 1, 7).double()]


def no_parameters() -> Any:
    return nn.SiLU(), [draw(1, 1, 7).bfloat16()]


def integers_alone() -> Any:
    return nn.Identity(), [torch.ones(1, 3, dtype=torch.int64)]


def on_meta() -> Any:
    return Net().to("meta"), [draw(1, 1, 7)]


class Holder:
    """A factory may be a method."""

    @staticmethod
    def make() -> Any:
        return plain()


def raises() -> Any:
    raise ZeroDivisionError("the shelf is empty")


def imports_what_is_missing() -> Any:
    import no_such_module_at_all  # noqa: F401

    raise AssertionError("unreachable")


def module_alone() -> Any:
    return Net()


def nothing() -> Any:
    return None


def no_requests() -> Any:
    return Net(), []


def a_tensor_for_requests() -> Any:
    return Net(), draw(1, 4, 7)


def a_number_for_a_request() -> Any:
    return Net(), [3]


def a_request_without_tensors() -> Any:
    return Net(), [(1, 2)]


def a_batch_of_two() -> Any:
    return Net(), [draw(1, 2, 7)]


def a_scalar_tensor() -> Any:
    return Net(), [(draw(1, 1, 7), torch.tensor(2.0))]


not_callable = 3


def config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def language_model(seed: int = 0) -> Any:
    """A llama of two layers, its weights drawn from integers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config())
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(draw(seed + number, *parameter.shape) / 4)
    return model


def write_gguf(path: Path) -> Path:
    """The same llama as a GGUF: matrices quantized to Q4_1, a byte-level tokenizer with a few merges."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)

    # The 256 characters that stand for bytes, and pairs of them.
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    merges = [f"{a} {b}" for a in "aeiou" for b in "bcdfghj"]
    tokens = ["<unk>", "<s>", "</s>", *letters, *(merge.replace(" ", "") for merge in merges)]
    tokens += [f"<extra{i}>" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (VOCABULARY - 3)])
    writer.add_token_merges(merges)
    for kind, token in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{kind}_token_id")(token)

    shapes = {"token_embd": (VOCABULARY, 64), "output_norm": (64,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_norm": (64,), f"blk.{i}.ffn_norm": (64,)}
        shapes |= {f"blk.{i}.attn_q": (64, 64), f"blk.{i}.attn_output": (64, 64)}
        shapes |= {f"blk.{i}.attn_k": (32, 64), f"blk.{i}.attn_v": (32, 64)}
        shapes |= {f"blk.{i}.ffn_gate": (96, 64), f"blk.{i}.ffn_up": (96, 64), f"blk.{i}.ffn_down": (64, 96)}
    for number, (name, shape) in enumerate(shapes.items()):
        values = draw(number, *shape).numpy()
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
