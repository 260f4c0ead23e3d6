"""A value that every thread has for itself, and that torch.compile can trace."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class _Own(threading.local):
    def __init__(self) -> None:
        self.value: Any = None


class PerThread(Generic[T]):
    """Holds a value during a forward pass, so that one model serves several threads.

    ``torch.compile`` reads a `threading.local` rightly, but drops what traced code writes into it where its graph
    breaks. Traced code therefore writes into a plain attribute, which is read where the thread itself has set nothing.
    What that costs: a compiled model serves one thread at a time.

    Args:
        empty: what it holds outside of a forward pass.
    """

    def __init__(self, empty: T) -> None:
        self.empty = empty
        self.traced = empty
        self.own = _Own()

    def get(self) -> T:
        """What this thread has set last."""
        value = self.own.value
        return self.traced if value is None else value

    def set(self, value: T) -> None:
        """Hold a value for this thread."""
        if torch.compiler.is_compiling():
            self.traced = value
        else:
            self.own.value = None if value is self.empty else value

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies start empty: a value belongs to a forward pass."""
        return PerThread, (self.empty,)
