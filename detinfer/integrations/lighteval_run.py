"""lighteval in this process, by its own command line, with its model wrapped."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

from detinfer.errors import EXIT_SAME, EXIT_USAGE, DetinferError, TargetError, UsageError
from detinfer.integrations import lighteval
from detinfer.integrations.enforced import Terms

BACKENDS = ("accelerate", "vllm", "sglang", "custom", "endpoint")
"""lighteval's commands that load a model with ``load_model`` and write a results file."""


def execute(words: list[str], terms: Terms) -> int:
    """One run of lighteval by its own command line; its exit code.

    Raises UsageError for a command that asks no model, or where lighteval is not there; TargetError where it fails.
    """
    if not words or words[0] not in BACKENDS:
        raise UsageError(f"lighteval {' '.join(words[:1])}: one of its commands {', '.join(BACKENDS)}")
    try:
        pipeline: Any = importlib.import_module("lighteval.pipeline")
        app = importlib.import_module("lighteval.__main__").app
        command = importlib.import_module("typer.main").get_command(app)
    except ImportError as error:
        raise UsageError(f"lighteval cannot be imported ({error}): {lighteval.INSTALL}") from error
    load = pipeline.load_model

    def wrapping(config: Any) -> Any:
        inner = load(config)
        return inner if isinstance(inner, lighteval.Enforced) else lighteval.wrap(inner, terms)

    pipeline.load_model = wrapping
    try:
        command.main(args=words, prog_name="lighteval", standalone_mode=False)
    except DetinferError:
        raise
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_USAGE if ended.code else EXIT_SAME
    except Exception as error:
        traceback.print_exc()
        raise TargetError(f"lighteval failed: {type(error).__name__}: {error}") from error
    finally:
        pipeline.load_model = load
    return EXIT_SAME
