"""transformers causal language models, from a folder or a hub id; safetensors weights only, no code from the hub."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch

from detinfer.errors import TargetError
from detinfer.models.targets import Loaded

INSTALL = "run pip install '.[hf]' in detinfer's checkout (or pip install transformers gguf accelerate)"


def transformers(what: str) -> Any:
    """The transformers package; TargetError says how to install it."""
    try:
        import transformers as found
    except ImportError as error:
        raise TargetError(f"target {what} needs transformers, which cannot be imported ({error}): {INSTALL}") from error
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings of transformers inside the block."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load(name: str, dtype: torch.dtype | None) -> Loaded:
    """Load a folder or hub id; ``dtype`` None takes the one that the weights are stored in.

    ``HF_HUB_OFFLINE`` is honoured. Weights that the model needs and the checkpoint lacks are an error: they would be
    random. A folder without a tokenizer loads too, for prompts of token ids.
    """
    what = f"hf:{name}"
    library = transformers(what)
    place = source(name)
    with quiet():
        try:
            module, report = library.AutoModelForCausalLM.from_pretrained(
                place,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # the report names them; the error would not
                output_loading_info=True,
            )
        except Exception as error:
            raise TargetError(f"target {what} cannot be loaded: {_first_lines(error)}") from error
    check_complete(what, report)
    return Loaded("causal_lm", module, tokenizer=tokenizer(name))


def source(name: str) -> str:
    """What transformers is given for a folder or hub id; TargetError for none."""
    if not name:
        raise TargetError("target hf: names nothing: give a folder or a hub id after the colon")
    folder = Path(name).expanduser()
    return str(folder) if folder.exists() else name


def skeleton(name: str) -> torch.nn.Module:
    """The model of a folder or hub id from its configuration alone, on the meta device: shapes and dtypes, no weights."""
    what = f"hf:{name}"
    library = transformers(what)
    with quiet():
        try:
            config = library.AutoConfig.from_pretrained(source(name), trust_remote_code=False)
            with torch.device("meta"):
                found: torch.nn.Module = library.AutoModelForCausalLM.from_config(
                    config, dtype=config.dtype or torch.float32, trust_remote_code=False
                )
        except Exception as error:
            raise TargetError(f"target {what} cannot be built from its configuration: {_first_lines(error)}") from error
    return found


def check_complete(what: str, report: dict[str, Any]) -> None:
    """TargetError when transformers' loading report tells of weights that were left random."""
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, report.get(problem) or ())):
            raise TargetError(
                f"target {what}: {problem.replace('_', ' ')}: {', '.join(found[:3])} ({len(found)} in all): the "
                f"checkpoint is not of this model, or not whole"
            )


def tokenizer(name: str) -> Callable[[str], list[int]] | None:
    """The tokenizer of a folder or hub id; None where it has none."""
    library = transformers(f"hf:{name}")
    with quiet():
        try:
            found = library.AutoTokenizer.from_pretrained(source(name), trust_remote_code=False)
            if found("sheep")["input_ids"] == found("train")["input_ids"]:  # of a configuration alone: it knows no word
                return None
        except Exception:  # whatever it is that it lacks: prompts are then given as token ids
            return None
    return lambda text: [int(token) for token in found(text)["input_ids"]]


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
