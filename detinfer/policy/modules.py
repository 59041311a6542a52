"""Where in a model a call is made: the stack of modules whose forward is running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ModuleStack:
    """The modules that one thread is inside of, outermost first, while ``watching``."""

    def __init__(self) -> None:
        self._stack: list[nn.Module] = []
        self._thread = get_ident()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every module of the process are on inside this block."""
        before = register_module_forward_pre_hook(self._enter)
        try:
            after = register_module_forward_hook(self._leave, always_call=True)
            try:
                yield
            finally:
                after.remove()
        finally:
            before.remove()
            self._stack.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if get_ident() == self._thread:
            self._stack.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # A pre-hook that raised left its module on the stack: drop what is above the one that ends.
        if get_ident() == self._thread and any(module is m for m in self._stack):
            while self._stack.pop() is not module:
                pass

    def path(self) -> str:
        """``LlamaForCausalLM.model.layers.0.mlp``: the innermost module's name under the outermost; empty outside."""
        if not self._stack:
            return ""
        root, inner = self._stack[0], self._stack[-1]
        name = next((name for name, module in root.named_modules() if module is inner), None)
        if name is None:
            return f"{type(root).__name__} … {type(inner).__name__}"
        return ".".join(filter(None, [type(root).__name__, name]))
