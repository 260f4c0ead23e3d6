"""Timings in rounds in which every variant has its turn, with the rounds left out that other processes disturbed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DISTURBED = 0.1
"""A round is left out if others took more than this share of all cores."""

_FEWEST = 3
_PATIENCE = 4


class Timings(NamedTuple):
    """Medians over rounds.

    Attributes:
        seconds: per variant.
        quiet: rounds that others did not disturb; only they count, unless there are less than three.
        rounds: all that were made, without the first, which warms up.
    """

    seconds: dict[str, float]
    quiet: int
    rounds: int


def time_rounds(
    variants: dict[str, Callable[[], object]], repeats: int, wait: Callable[[], None] = lambda: None
) -> Timings:
    """Time variants in alternation until ``repeats`` rounds were quiet, or four times as many were made.

    Two threads that meet at every product wait for the one that shares its core, and the more so the more products
    there are: ratios of disturbed rounds say little about an idle machine.

    Args:
        variants: what to time.
        repeats: quiet rounds wanted.
        wait: called before and after every timing, for devices that run behind.
    """
    rounds: list[tuple[bool, dict[str, float]]] = []
    while sum(quiet for quiet, _ in rounds[1:]) < repeats and len(rounds) <= _PATIENCE * repeats:
        seconds = {}
        before = _others()
        started = time.perf_counter()
        for name, run in variants.items():
            wait()
            begun = time.perf_counter()
            run()
            wait()
            seconds[name] = time.perf_counter() - begun
        share = (_others() - before) / ((time.perf_counter() - started) * (os.cpu_count() or 1))
        rounds.append((share <= DISTURBED, seconds))
    del rounds[0]
    counted = [seconds for quiet, seconds in rounds if quiet]
    quiet = len(counted)
    if quiet < min(_FEWEST, repeats):
        counted = [seconds for _, seconds in rounds]
    return Timings({name: statistics.median(each[name] for each in counted) for name in variants}, quiet, len(rounds))


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _others() -> float:
    """Seconds of processor time that anything but this process has taken; zero where the system does not say."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()
