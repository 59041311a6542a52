"""transformers models cut over ranks by their own plan (``tp_plan="auto"``), one process for each rank.

transformers cuts the weights and calls torch.distributed (gloo), whose sums a policy takes over. What is added here: the
ranks are joined, what they cannot be cut into is said before, and every result that all ranks should hold is noted, so
that the ranks can be compared byte for byte.
"""

from __future__ import annotations

import copy
import datetime
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from detinfer.errors import TargetError
from detinfer.models import huggingface
from detinfer.models.ranks import Ranks
from detinfer.models.targets import Loaded

SUMMED = ("rowwise", "rowwise_rep", "rowwise_split_input", "embedding_rowwise", "moe_tp_experts", "all_reduce")
"""Styles of transformers' plans whose modules end in a sum over ranks."""

GATHERED = ("colwise_rep", "colwise_gather_output")
"""Styles whose modules end in a gathering of every rank's columns."""


def load(
    spec: str, whole: Callable[[], Loaded], dtype: torch.dtype | None, ranks: Ranks, where: torch.device
) -> Loaded:
    """``cut``, and what every rank should hold is noted for ``ranks`` to compare."""
    loaded = cut(spec, whole, dtype, ranks, where)
    watch(loaded.module, ranks)
    return loaded


def cut(spec: str, whole: Callable[[], Loaded], dtype: torch.dtype | None, ranks: Ranks, where: torch.device) -> Loaded:
    """This rank's share of a transformers causal language model, on ``where``; all ranks call it together.

    ``whole`` loads all of it, unless ``spec`` is ``hf:``, whose files transformers reads share by share. Raises
    TargetError where the model has no plan or its heads cannot be shared out evenly.
    """
    with _files(spec, whole, ranks) as (source, config, tokenizer, digest), huggingface.quiet():
        library = huggingface.transformers(spec)
        check(spec, config, ranks.size)
        join(ranks, where)
        plan = library.distributed.DistributedConfig(tp_plan="auto", tp_size=ranks.size)
        try:
            module, report = library.AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                distributed_config=plan,
                output_loading_info=True,
            )
        except Exception as error:
            text = " ".join(str(error).split())[:400]
            raise TargetError(
                f"target {spec} cannot be cut over {ranks.size} ranks: {type(error).__name__}: {text}"
            ) from error
        ranks.share(None)  # the files are read
    huggingface.check_complete(spec, report)
    return Loaded("causal_lm", module, tokenizer=tokenizer, digest=digest, placed=True)


@contextmanager
def _files(spec: str, whole: Callable[[], Loaded], ranks: Ranks) -> Iterator[tuple[str, Any, Any, str]]:
    """Where the model's files are, its configuration, tokenizer and weights' own digest; files are written where none are."""
    if spec.startswith("hf:"):
        name = spec.removeprefix("hf:")
        place = huggingface.source(name)
        yield place, _config(spec, huggingface.transformers(spec), place), huggingface.tokenizer(name), ""
        return
    loaded = whole()
    if not is_transformers(loaded.module) or loaded.kind != "causal_lm":
        raise TargetError(
            f"target {spec}: {type(loaded.module).__name__} cannot be cut over {ranks.size} ranks: the built-in models "
            "and transformers' causal language models can. Leave --tp out"
        )
    module: Any = loaded.module
    tokenizer, digest, config = loaded.tokenizer, loaded.digest, copy.deepcopy(module.config)  # saving writes into it
    check(spec, config, ranks.size)
    with tempfile.TemporaryDirectory() as own:
        folder = ranks.share(own)[0]
        if ranks.rank == 0:
            with huggingface.quiet():
                module.save_pretrained(folder)
        del module, loaded  # all of it, on every rank
        ranks.share(None)
        yield folder, config, tokenizer, digest
        ranks.share(None)


def is_transformers(module: nn.Module) -> bool:
    """Whether a model is one of transformers' own."""
    return type(module).__module__.partition(".")[0] == "transformers"


def _config(spec: str, library: Any, source: str) -> Any:
    try:
        return library.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise TargetError(f"target {spec} cannot be loaded: {type(error).__name__}: {text}") from error


def check(spec: str, config: Any, size: int) -> None:
    """TargetError where a configuration cannot be cut over ``size`` ranks: every rank needs whole heads, and as many."""
    config = config.get_text_config()
    if not getattr(config, "base_model_tp_plan", None):
        raise TargetError(f"target {spec}: transformers has no tensor-parallel plan for {type(config).__name__}")
    counts = {
        "attention heads": getattr(config, "num_attention_heads", None),
        "KV heads": getattr(config, "num_key_value_heads", None),
    }
    for what, count in counts.items():
        if isinstance(count, int) and count % size:
            fits = [n for n in range(2, 9) if all(isinstance(c, int) and c % n == 0 for c in counts.values() if c)]
            works = f"--tp {' or '.join(map(str, fits))} would do" if fits else "no number of ranks up to 8 would do"
            raise TargetError(
                f"target {spec}: {count} {what} cannot be shared out evenly over {size} ranks, and a cut head is another "
                f"function; {works}"
            )


def join(ranks: Ranks, where: torch.device) -> None:
    """Make torch.distributed's default group of these ranks: gloo's, or NCCL's between GPUs."""
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=ranks.timeout)
        on_gpu = where.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(where)
        backend, own = ("nccl", where) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.size, timeout=timeout, device_id=own)

    def total(x: torch.Tensor) -> torch.Tensor:
        there = x.to(where, copy=True)
        dist.all_reduce(there)
        return there.to(x.device)

    ranks.add_by(total)


def styles(module: nn.Module) -> dict[str, str]:
    """The style of every module of a transformers model that its plan names."""
    plan: dict[str, str] = getattr(module, "tp_plan", None) or {}
    found = {name: plan.get(re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)) for name, _ in module.named_modules()}
    return {name: style for name, style in found.items() if style is not None}


def watch(module: nn.Module, ranks: Ranks) -> None:
    """Note what every rank holds of each result that all should have: sums, gathered columns, blocks, the logits."""
    by_style = styles(module)
    for name, part in module.named_modules():
        style = by_style.get(name, "")
        block = re.fullmatch(r"(.*\.)?layers\.\d+", name) is not None
        if style in SUMMED or style in GATHERED or block or not name:
            part.register_forward_hook(_noting(ranks, name or "the logits", summed=style in SUMMED))


def _noting(ranks: Ranks, name: str, summed: bool) -> Callable[..., None]:
    def note(_: nn.Module, __: Any, output: Any) -> None:
        held = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        if isinstance(held, torch.Tensor):
            ranks.note(held, name, summed=summed)

    return note
