"""The upscaled modules of a plan or an output as lines: parameters, bytes, and what compression loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleRow:
    """An upscaled module.

    Attributes:
        path: its name in the checkpoint.
        form: of its task vectors, with their sizes.
        router: its shape.
        lambdas: λₖ per expert.
        static_parameters: of its own weights.
        vector_parameters: of its task vectors.
        vector_bytes: of all that is stored for them.
        norm: √Σ ‖τ‖² over the weights and experts whose task vectors are compressed; None if not known.
        dropped: likewise of what compression drops.
    """

    path: str
    form: str
    router: str
    lambdas: tuple[float, ...]
    static_parameters: int
    vector_parameters: int
    vector_bytes: int
    norm: float | None = None
    dropped: float | None = None

    @property
    def error(self) -> float | None:
        """‖τ − what is kept‖ / ‖τ‖, from 0 to 1; None if not known."""
        return relative_error([self])


def relative_error(rows: Iterable[ModuleRow]) -> float | None:
    """The same over several modules."""
    known = [(row.norm, row.dropped) for row in rows if row.norm is not None and row.dropped is not None]
    if not known:
        return None
    whole = math.sqrt(sum(norm * norm for norm, _ in known))
    return math.sqrt(sum(dropped * dropped for _, dropped in known)) / whole if whole else 0.0


def describe_sizes(form: str, sizes: Iterable[tuple[int, ...]]) -> str:
    """A form with its ranks, or its entries per expert."""
    numbers = sorted({size for own in sizes for size in own})
    if not numbers:
        return form
    return f"{form} {numbers[0]}" if len(numbers) == 1 else f"{form} {numbers[0]}-{numbers[-1]}"


def describe_router(name: str, path: str, depth: int, width: int, routing: str) -> str:
    """A router's shape, what it decides for, and its name where several modules have it."""
    shared = "" if name == path else f", {name}"
    return f"depth {depth}, width {width}{', per token' if routing == 'token' else ''}{shared}"


def module_lines(rows: Sequence[ModuleRow], format_size: Callable[[int], str]) -> list[str]:
    """The modules as a table, with the error of each form below it."""
    width = max(len("module"), *(len(row.path) for row in rows))
    form = max(len("form"), *(len(row.form) for row in rows))
    router = max(len("router"), *(len(row.router) for row in rows))
    lines = [
        f"{'module':<{width}}  {'form':<{form}}{'weights':>12}{'task vectors':>14}{'size':>10}{'error':>9}  "
        f"{'router':<{router}}  λ"
    ]
    for row in rows:
        numbers = f"{row.static_parameters:>12,}{row.vector_parameters:>14,}{format_size(row.vector_bytes):>10}"
        lambdas = ", ".join(f"{value:g}" for value in row.lambdas)
        lost = "?" if row.error is None else f"{row.error:.2%}"
        lines.append(f"{row.path:<{width}}  {row.form:<{form}}{numbers}{lost:>9}  {row.router:<{router}}  {lambdas}")
    for name in dict.fromkeys(row.form.partition(" ")[0] for row in rows):
        own = [row for row in rows if row.form.partition(" ")[0] == name]
        error = relative_error(own)
        if name != "dense" and error is not None:
            share = sum(row.vector_parameters for row in own) / max(1, sum(row.static_parameters for row in own))
            lines.append(f"{name}: {error:.2%} of the task vectors' norm is lost, with {share:.2f} x the weights")
    return lines
