"""lm-evaluation-harness in this process, by its own command line, with its model wrapped."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any

from detinfer.errors import EXIT_SAME, EXIT_USAGE, DetinferError, TargetError, UsageError
from detinfer.integrations import lm_eval
from detinfer.integrations.enforced import Terms


def execute(words: list[str], terms: Terms) -> int:
    """One run of the harness by its own command line; its exit code.

    Raises UsageError for a command that is not one of ``lm_eval run``, TargetError where the harness itself fails.
    """
    lm_eval.register()
    harness = importlib.import_module("lm_eval._cli").HarnessCLI()
    importlib.import_module("lm_eval.utils").setup_logging()
    before, sys.argv = sys.argv, ["lm_eval", *words]
    try:
        arguments = harness.parse_args()
        if arguments.command != "run":
            raise UsageError(f"lm_eval {arguments.command}: only lm_eval run asks a model anything")
        _wrap(arguments, terms)
        harness.execute(arguments)
    except DetinferError:
        raise
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_USAGE if ended.code else EXIT_SAME
    except Exception as error:
        traceback.print_exc()
        raise TargetError(f"lm-evaluation-harness failed: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = before
    return EXIT_SAME


def _wrap(arguments: Any, terms: Terms) -> None:
    """The model of a command line, and of its configuration file, becomes the inner one."""
    config: dict[str, Any] = {}
    if arguments.config:
        config = importlib.import_module("lm_eval.config.evaluate_config").EvaluatorConfig.load_yaml_config(
            arguments.config
        )
    given = config.get("model_args") or {}
    if isinstance(given, str):
        given = importlib.import_module("lm_eval.utils").simple_parse_args_string(given)
    given = {**given, **(arguments.model_args or {})}
    model = arguments.model or config.get("model") or "hf"
    if model != "detinfer":
        given["inner"] = model
    arguments.model = "detinfer"
    arguments.model_args = given | {name: value for name, value in vars(terms).items() if value is not None}
