"""``random:NAME``: transformers models of real sizes with weights drawn from integers, made on the device that runs them.

No download, and no copy of a checkpoint through the host: an 8B-sized model is there in seconds. The same seed, kind of
device and version of torch give the same weights.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from detinfer import bits
from detinfer.errors import TargetError
from detinfer.models.huggingface import transformers
from detinfer.models.targets import Loaded

_DENSE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")

SHAPES: dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]] = {
    "qwen3-8b": ("Qwen3", _DENSE + _HEADS, (151936, 4096, 12288, 36, 32, 8, 128)),
    "qwen3-moe": ("Qwen3Moe", _DENSE + _HEADS + _EXPERTS, (151936, 2048, 6144, 12, 32, 4, 128, 128, 8, 768)),
    "smollm2": ("Llama", _DENSE + _HEADS, (49152, 576, 1536, 30, 9, 3, 64)),
    "qwen3-small": ("Qwen3", _DENSE + _HEADS, (1000, 128, 192, 2, 8, 2, 16)),
    "qwen3-moe-small": ("Qwen3Moe", _DENSE + _HEADS + _EXPERTS, (1000, 96, 160, 2, 4, 2, 16, 8, 3, 40)),
}
"""The shapes of Qwen3-8B, of Qwen3-30B-A3B with 12 of its 48 layers, of SmolLM2-135M, and two small ones."""

_PIECE = 1 << 27
"""Elements drawn at a time: an embedding of 600 million needs room for integers too."""


def load(name: str, dtype: torch.dtype, seed: int, device: torch.device) -> Loaded:
    """A model of SHAPES on ``device``, in eval mode; TargetError for another name."""
    library = transformers(f"random:{name}")
    if name not in SHAPES:
        raise TargetError(f"target random:{name}: one of {', '.join(SHAPES)}")
    kind, names, values = SHAPES[name]
    sizes = dict(zip(names, values, strict=True))
    if kind == "Qwen3Moe":
        sizes |= {"norm_topk_prob": True}
    # architectures and dtype as a checkpoint has them: cut over ranks, the model is read from one, and is the same model.
    more = {"architectures": [f"{kind}ForCausalLM"], "dtype": dtype}
    config = getattr(library, f"{kind}Config")(**sizes, **more, max_position_embeddings=8192, tie_word_embeddings=False)
    with torch.device("meta"):
        model: Any = getattr(library, f"{kind}ForCausalLM")(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its buffers are computed
    draw(model, seed, device)
    text = f"random {kind} {sizes} seed {seed} torch {torch.__version__} on {device.type}\n"
    return Loaded("causal_lm", model, digest=checksum(model, text), placed=True)


def draw(model: Any, seed: int, device: torch.device) -> None:
    """Fill the parameters of ``model``, which are on ``device``, from an integer generator: in place, a piece at a time."""
    source = torch.Generator(device).manual_seed(seed + 1)
    for name, weight in model.named_parameters():
        scale = (1 if weight.dim() < 2 else weight.shape[-1]) ** -0.5 / 64
        for piece in weight.view(-1).split(_PIECE):
            drawn = torch.randint(-127, 128, piece.shape, generator=source, device=device, dtype=torch.int16)
            piece.copy_(drawn * scale)
        if weight.dim() < 2:
            weight.div_(16).add_(1)
        elif "embed" in name:
            weight.mul_(16)


@bits.unseen
def checksum(model: torch.nn.Module, text: str) -> str:
    """SHA-256 of ``text`` and of a sum for each parameter: its words times odd numbers of their places, modulo 2^64.

    Integers alone, so the same on every device, and made where the weights are. It tells weights apart by accident, not
    against intent.
    """
    whole = hashlib.sha256(text.encode())
    for name, weight in sorted(model.named_parameters()):
        total = 0
        words: Any = weight.detach().reshape(-1).view(torch.int16 if weight.element_size() == 2 else torch.int32)
        for start, piece in zip(range(0, words.numel(), _PIECE), words.split(_PIECE), strict=True):
            places = torch.arange(start, start + piece.numel(), device=piece.device)
            total += int((piece.long() * (places * 2654435761 * 2 + 1)).sum())
        whole.update(f"{name} {list(weight.shape)} {weight.dtype} {total % 2**64}\n".encode())
    return whole.hexdigest()
