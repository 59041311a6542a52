"""Imported by every Python process under ``detinfer run``: puts the policy in force as soon as torch is imported.

What is served over uvicorn says under which fingerprint (``run.served``).

Standard library alone, since most processes never import torch. A sitecustomize that the environment has of its own runs
first.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import threading
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


class _Loader:
    """torch's own loader (or detinfer's, or uvicorn's), and then the policy."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        """As the loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        """Import the module, then put the policy in force. SystemExit where that cannot be: nothing runs without it."""
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if module.__name__ == "uvicorn.config":  # with torch or before it: whichever comes second marks its answers
            child = sys.modules.get("detinfer.run.child")
            if child is not None:
                child.serving()
            return
        if module.__name__ == "detinfer":  # its modules import torch halfway: torch goes first, and comes back here
            importlib.import_module("torch")
            return
        try:
            from detinfer.run.child import enter
        except ImportError as error:
            sys.exit(
                f"detinfer run: {sys.executable} imports torch and cannot import detinfer ({error}): install detinfer in that "
                "environment, so that the policy can be put in force there"
            )
        enter()


class _Finder:
    """Finds torch and detinfer as the other finders do, and wraps their loaders.

    Every time: libraries look for torch (``importlib.util.find_spec``) long before they import it.
    """

    def __init__(self) -> None:
        self._asking: set[tuple[int, str]] = set()  # this thread asks the other finders just now

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The module's own spec, its loader wrapped."""
        key = (threading.get_ident(), name)
        if name not in ("torch", "detinfer", "uvicorn.config") or key in self._asking:
            return None
        self._asking.add(key)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.discard(key)
        if spec is None or spec.loader is None or isinstance(spec.loader, _Loader):
            return spec
        spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


def _chain() -> None:
    """Run the sitecustomize that would have been imported without this one."""
    elsewhere = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_chain()
if "DETINFER_RUN" in os.environ:
    sys.meta_path.insert(0, _Finder())
