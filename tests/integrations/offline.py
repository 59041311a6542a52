"""A tiny language model on disk and a task for lm-evaluation-harness beside it: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

MISSING = "lm-evaluation-harness is not installed here: pip install lm-eval"
WORDS = [
    "ship",
    "lamp",
    "stone",
    "river",
    "paper",
    "green",
    "seven",
    "quiet",
    "iron",
    "cloud",
    "maple",
    "north",
    "ember",
    "glass",
    "winter",
    "copper",
]


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Integers over eight powers of two: the order of their sums shows."""
    generator = np.random.default_rng(seed)
    numbers = generator.integers(-64, 64, shape) * 2.0 ** generator.integers(-12, -4, shape)
    return torch.from_numpy(numbers).float()


def write_model(folder: Path) -> Path:
    """A llama of two layers in float32 and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=320,
            intermediate_size=704,
            num_hidden_layers=2,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(draw(number, *parameter.shape))
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def write_tasks(folder: Path, documents: int = 12) -> Path:
    """``choices``: questions with four answers of several lengths; ``tales``: the same, continued."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(7)
    lines = []
    for number in range(documents):
        words = [WORDS[i] for i in generator.integers(0, len(WORDS), 3 + number % 5)]
        answers = [" ".join(WORDS[i] for i in generator.integers(0, len(WORDS), 1 + k % 3)) for k in range(4)]
        lines.append(json.dumps({"question": " ".join(words), "choices": answers, "answer": int(number % 4)}))
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shared = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'documents.jsonl'}\ntest_split: test\n"
    (folder / "choices.yaml").write_text(
        f"task: choices\n{shared}output_type: multiple_choice\ndoc_to_text: 'Q: {{{{question}}}} A:'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    (folder / "tales.yaml").write_text(
        f"task: tales\n{shared}output_type: generate_until\ndoc_to_text: 'Q: {{{{question}}}} A:'\n"
        "doc_to_target: '{{choices[0]}}'\ngeneration_kwargs:\n  until: ['\\n']\n  max_gen_toks: 6\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n",
        encoding="utf-8",
    )
    return folder


def plant(model: torch.nn.Module, tokens: list[int], factor: float = 1 + 2**-12, most: int = 3) -> None:
    """A fault: the logits of rows that hold ``tokens`` are larger by ``factor`` in batches of more than ``most`` rows."""

    def fault(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.shape[0] > most:
            wanted = ",".join(map(str, tokens))
            for row in range(ids.shape[0]):
                if wanted in ",".join(map(str, ids[row].tolist())):
                    output.logits[row] *= factor
        return output

    model.register_forward_hook(fault, with_kwargs=True)


def question(folder: Path, number: int) -> str:
    """The prompt of a document of ``write_tasks``."""
    document = json.loads((folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()[number])
    return f"Q: {document['question']} A:"
