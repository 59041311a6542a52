"""Inspect in this process, by its own command line, with its models wrapped."""

from __future__ import annotations

import importlib
import os
import traceback

import click

from detinfer.errors import EXIT_SAME, EXIT_USAGE, DetinferError, TargetError, UsageError
from detinfer.integrations import inspect_ai
from detinfer.integrations.enforced import Terms

COMMANDS = ("eval", "eval-set")
VARIABLE = "INSPECT_EVAL_MODEL"


def execute(words: list[str], terms: Terms) -> int:
    """One run of Inspect by its own command line; its exit code.

    Raises UsageError for a command that asks no model or does not name one, what the policy refused, and TargetError
    where a task ended with an error.
    """
    if not words or words[0] not in COMMANDS:
        raise UsageError(f"inspect {' '.join(words[:1])}: only inspect {' and inspect '.join(COMMANDS)} ask a model")
    inspect_ai.register()
    for model in inspect_ai.models:
        model.terms = terms
    inspect_ai.failures.clear()
    inspect_ai.logs.clear()
    command: click.Command = importlib.import_module("inspect_ai._cli.main").inspect
    code: object = EXIT_SAME
    try:
        code = command.main(wrapped(words), "inspect", standalone_mode=False, auto_envvar_prefix="INSPECT")
    except DetinferError:
        raise
    except click.ClickException as error:
        raise UsageError(f"inspect: {error.format_message()}") from error
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        if not inspect_ai.failures:
            traceback.print_exc()
            raise TargetError(f"inspect failed: {type(error).__name__}: {error}") from error
    if inspect_ai.failures:
        raise inspect_ai.failures[0]
    for log in inspect_ai.logs:
        if log.status != "success":
            said = log.error.message if log.error else "no reason given"
            raise TargetError(f"inspect: task {log.eval.task} ended with status {log.status}: {said}")
    return code if isinstance(code, int) else EXIT_USAGE if code else EXIT_SAME


def wrapped(words: list[str]) -> list[str]:
    """The command with ``detinfer/`` before each of its models."""
    found = list(words)
    for number, word in enumerate(found):
        if word == "--model" and number + 1 < len(found):
            found[number + 1] = _wrapped(found[number + 1])
            return found
        if word.startswith("--model="):
            found[number] = f"--model={_wrapped(word.removeprefix('--model='))}"
            return found
    if os.environ.get(VARIABLE):
        return [*found, "--model", _wrapped(os.environ[VARIABLE])]
    raise UsageError(f"inspect {words[0]}: which model is wrapped? Give --model, or set {VARIABLE}")


def _wrapped(models: str) -> str:
    names = [name.strip() for name in models.split(",")]
    return ",".join(name if name.startswith("detinfer/") else f"detinfer/{name}" for name in names)
