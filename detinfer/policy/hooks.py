"""What a policy puts into transformers: an explicit list of places whose own code has another order.

A place is a function or method named by its module and attributes. Modules that are loaded get ours at once; one that
is imported while a policy is in force gets it as soon as it has run. Leaving the last policy puts all of them back.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from detinfer.policy import transformers_moe as ours


@dataclass(frozen=True)
class Hook:
    """``attribute`` of ``module`` becomes ``make(its own value)``; ``models`` need it, and ``why`` says what for."""

    module: str
    attribute: str
    make: Callable[[Any], Any]
    models: tuple[str, ...]
    why: str


HOOKS: tuple[Hook, ...] = (
    Hook(
        "transformers.integrations.moe",
        "ExpertsInterface.get_interface",
        lambda _: _get_interface,
        ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe", "qwen2_moe"),
        "eager, grouped_mm and batched_mm round each expert's output and add them in orders of their own",
    ),
    Hook(
        "transformers.models.deepseek_v3.modeling_deepseek_v3",
        "DeepseekV3MoE.forward",
        lambda _: ours.shared_experts_forward,
        ("deepseek_v3",),
        "the shared expert is added after a rounding of its own and one of the experts",
    ),
    Hook(
        "transformers.models.gpt_oss.modeling_gpt_oss",
        "eager_attention_forward",
        lambda _: ours.sinks_forward,
        ("gpt_oss",),
        "the sink stands behind the last key, so that its place in the sum depends on the number of keys",
    ),
    Hook(
        "transformers.integrations.sdpa_attention",
        "use_gqa_in_sdpa",
        lambda _: _shared_heads,
        ("llama", "qwen3", "gemma3", "mixtral", "qwen3_moe"),
        "under a mask it copies K and V once for each query head, which our attention reads where they lie: the same bytes",
    ),
    Hook(
        "transformers.generation.continuous_batching.input_outputs",
        "build_attention_mask",
        lambda own: _hidden(own),
        ("llama", "qwen3", "mixtral", "qwen3_moe"),
        "it hides other requests' keys by the dtype's least number, which leaves them their places in attention's order",
    ),
)


def _get_interface(self: Any, experts_implementation: Any, default: Any) -> Any:
    """Whatever form a model was configured with, ours runs."""
    return ours.experts_forward


def _shared_heads(*_: Any) -> bool:
    """Whether attention may be given fewer heads of K and V than of queries: ours takes them with and without a mask."""
    return True


def _hidden(own: Callable[..., None]) -> Callable[..., None]:
    """The mask of a packed batch with -inf where transformers writes the least number: a row sees its own request's keys."""

    @functools.wraps(own)
    def build(attention_mask: Any, cumulative_seqlens_q: Any, *given: Any, **named: Any) -> None:
        own(attention_mask, cumulative_seqlens_q, *given, **named)
        rows = attention_mask[..., : cumulative_seqlens_q[-1], :]  # those after them are nobody's
        rows.masked_fill_(rows <= torch.finfo(rows.dtype).min, -math.inf)

    return build


def _register(module: Any) -> None:
    """Let a model be configured with ``experts_implementation="detinfer"``, in a policy or without one."""
    module.ALL_EXPERTS_FUNCTIONS.register("detinfer", ours.experts_forward)


class Hooks(importlib.abc.MetaPathFinder):
    """All hooks, in place until ``remove``."""

    def __init__(self, hooks: Sequence[Hook] = HOOKS) -> None:
        self._undo: list[Callable[[], None]] = []
        self._waiting: dict[str, list[Hook]] = {}
        for hook in hooks:
            self._waiting.setdefault(hook.module, []).append(hook)
        for name in list(self._waiting):
            if (module := sys.modules.get(name)) is not None and _is_loaded(module):
                self._put(module)
        if self._waiting:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Put everything back."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._waiting.clear()
        while self._undo:
            self._undo.pop()()

    def _put(self, module: ModuleType) -> None:
        for hook in self._waiting.pop(module.__name__, ()):
            *path, name = hook.attribute.split(".")
            holder: Any = functools.reduce(getattr, path, module)
            own = getattr(holder, name)
            setattr(holder, name, hook.make(own))
            self._undo.append(functools.partial(setattr, holder, name, own))
        if module.__name__ == HOOKS[0].module:
            _register(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, with a loader that puts our function in when the module has run."""
        if fullname not in self._waiting:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._put)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Another loader, and what is done once it has run a module."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the loader does."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """As the loader does; then ours."""
        self._loader.exec_module(module)
        self._then(module)


def _is_loaded(module: ModuleType) -> bool:
    """Whether the module has run to its end: one that is being imported gets its hook from its loader."""
    spec = module.__spec__
    return spec is None or not getattr(spec, "_initializing", False)
