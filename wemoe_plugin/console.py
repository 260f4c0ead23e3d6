"""What the command says: lines, a progress bar, sizes and times for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from wemoe_plugin.errors import WemoeError

if TYPE_CHECKING:
    from wemoe_plugin.evaluation.scores import Scores
    from wemoe_plugin.merging.executor import Progress
    from wemoe_plugin.tuning.loop import Check, TuningOutcome

Say = Callable[[str], None]
"""Takes one line for the user."""

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def speaker(quiet: bool) -> Say:
    """Prints lines to stdout, or nothing."""
    return (lambda line: None) if quiet else typer.echo


def print_json(value: Any) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(value, indent=2))


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Note the seconds a step takes under its name."""
    started = time.perf_counter()
    yield
    timings[name] = round(time.perf_counter() - started, 3)


@contextmanager
def progress_bar(total: int, quiet: bool, doing: str = "merging") -> Iterator[Progress | None]:
    """A bar over bytes on a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task(doing, total=total)
        yield lambda done: bar.advance(job, done)


def check_printer(say: Say) -> Callable[[Check], None]:
    """Prints what tuning sees on its held-out data."""

    def show(check: Check) -> None:
        loss = "" if check.step == 0 else f"  loss {check.loss:8.4f}"
        say(f"  step {check.step:5d}  held-out {check.held_out:8.4f}{loss}")

    return show


def tell_outcome(outcome: TuningOutcome, say: Say) -> None:
    """How tuning ended."""
    if outcome.collapsed:
        say(
            f"predictions on {', '.join(outcome.collapsed)} collapsed onto few classes: stopped and went back to step "
            f"{outcome.best_step}. Try objective: distill, or a smaller learning_rate."
        )
    else:
        say(f"kept the routers of step {outcome.best_step}, the best on held-out data")


def tell_scores(scores: Scores, say: Say) -> None:
    """The table of accuracies."""
    from wemoe_plugin.evaluation.report import score_lines

    for line in ("", *score_lines(scores)):
        say(line)


def parse_size(text: str, option: str) -> int:
    """From ``4GiB`` to bytes.

    Raises:
        WemoeError: it is not a positive size.
    """
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().upper() or "B"
    try:
        value = int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value <= 0:
        raise WemoeError(f"{option} {text!r} is not a size such as 500MB or 4GiB")
    return value


def format_size(count: int) -> str:
    """Bytes for people, in powers of ten."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
