"""The command line: a verb is a file, and this is the only place where an error becomes a message and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import click

import detinfer
from detinfer import errors
from detinfer.cli.bench import bench
from detinfer.cli.env import env
from detinfer.cli.record import record
from detinfer.cli.verify import verify

EXIT_CODES = """\b
Exit codes:
  0    same: every judged comparison agrees
  1    diverged: bits differ
  2    usage: an option, a target or a layer that cannot be used
  3    internal error
  4    golden missing, stale, corrupt or of another model
  5    vacuous: nothing could have failed
  6    infrastructure: a process, server or disk failed
  130  interrupted"""


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(detinfer.__version__, prog_name="detinfer")
def cli() -> None:
    """Deterministic inference: record a model's layers, replay them, assert identical bytes."""


for _command in (record, verify, env, bench):
    cli.add_command(_command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; every message goes to stderr."""
    try:
        outcome = cli.main(
            args=None if arguments is None else list(arguments), prog_name="detinfer", standalone_mode=False
        )
        return outcome if isinstance(outcome, int) else errors.EXIT_SAME
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return errors.EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return errors.EXIT_USAGE
    except errors.DetinferError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except MemoryError as error:
        click.echo(f"error: out of memory: {error}", err=True)
        return errors.EXIT_INFRASTRUCTURE
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        return errors.EXIT_INFRASTRUCTURE
    except Exception:
        click.echo(traceback.format_exc(), err=True)
        click.echo("internal error in detinfer: please report it with the lines above", err=True)
        return errors.EXIT_INTERNAL


def main() -> None:
    """Entry point of the ``detinfer`` command."""
    sys.exit(run())
