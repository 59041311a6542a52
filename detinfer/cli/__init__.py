"""The command line: a verb is a file, and this is the only place where an error becomes a message and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import click

import detinfer
from detinfer import errors
from detinfer.cli import ranks
from detinfer.cli.bench import bench
from detinfer.cli.diff import diff
from detinfer.cli.env import env
from detinfer.cli.eval import evaluate
from detinfer.cli.fingerprint import fingerprint
from detinfer.cli.golden import golden
from detinfer.cli.locate import locate
from detinfer.cli.policy import policy
from detinfer.cli.prove import prove
from detinfer.cli.record import record
from detinfer.cli.run import run as run_command
from detinfer.cli.verify import verify
from detinfer.cli.verify_server import verify_server

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


class Verbs(click.Group):
    """The verbs; ``verify`` of a URL is ``verify-server``, which has other options."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first word names, and the words after it."""
        if args[0] == "verify" and any(word.startswith(("http://", "https://")) for word in args[1:]):
            args = ["verify-server", *args[1:]]
        return super().resolve_command(ctx, args)


@click.group(
    cls=Verbs, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@click.version_option(detinfer.__version__, prog_name="detinfer")
def cli() -> None:
    """Deterministic inference: record a model's layers, replay them, assert identical bytes."""


for _command in (
    record,
    verify,
    verify_server,
    locate,
    diff,
    golden,
    policy,
    prove,
    run_command,
    evaluate,
    fingerprint,
    env,
    bench,
):
    cli.add_command(_command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; every message goes to stderr."""
    return attempt(arguments)[0]


def attempt(arguments: Sequence[str] | None = None) -> tuple[int, bool]:
    """Run one command line: its exit code, and whether that is an error's."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # The words themselves are kept for --tp, which runs them again on each rank.
        outcome = cli.main(args=words, prog_name="detinfer", standalone_mode=False, obj=words)
        return outcome if isinstance(outcome, int) else errors.EXIT_SAME, False
    except (click.Abort, KeyboardInterrupt):
        ranks.complain("interrupted")
        return errors.EXIT_INTERRUPTED, True
    except click.ClickException as error:
        if ranks.number() == 0:
            error.show()
        return errors.EXIT_USAGE, True
    except errors.DetinferError as error:
        ranks.complain(f"error: {error}")
        return error.exit_code, True
    except MemoryError as error:
        ranks.complain(f"error: out of memory: {error}")
        return errors.EXIT_INFRASTRUCTURE, True
    except OSError as error:
        ranks.complain(f"error: {error}")
        return errors.EXIT_INFRASTRUCTURE, True
    except Exception:
        ranks.complain(f"{traceback.format_exc()}\ninternal error in detinfer: please report it with the lines above")
        return errors.EXIT_INTERNAL, True


def main() -> None:
    """Entry point of the ``detinfer`` command."""
    sys.exit(run())
