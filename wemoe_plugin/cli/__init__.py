"""The command ``wemoe-merge``: parse, call, print. Whatever is heavy is imported inside the commands."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence

import typer

from wemoe_plugin.cli import merging, outputs, showcase  # noqa: F401 (in the order of the help)
from wemoe_plugin.cli.app import app
from wemoe_plugin.errors import WemoeError


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; exits with status 0 done, 2 the input is wrong, 1 anything else, 130 interrupted."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # so that what is half-written is removed
    try:
        app(args=list(args) if args is not None else None, prog_name="wemoe-merge")
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            typer.echo("interrupted; nothing half-written is left", err=True)
        raise
    except WemoeError as error:
        _fail(str(error), 2)
    except Exception as error:
        if os.environ.get("WEMOE_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error}\n(unexpected; set WEMOE_DEBUG=1 to see where)", 1)


_INTERRUPTED = 130


def _interrupt(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the removal
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> None:
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    sys.exit(status)
