"""A value that every thread has for itself, and that torch.compile can trace."""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class PerThread(Generic[T]):
    """Holds a value during a forward pass, so that one model serves several threads.

    ``torch.compile`` drops what traced code writes into a `threading.local` where its graph breaks. Traced code uses a
    plain attribute therefore, and code that is not traced writes there too. What that costs: a compiled model whose
    graph breaks *inside* of an upscaled module serves one thread at a time.

    Args:
        empty: what it holds outside of a forward pass.
    """

    def __init__(self, empty: T) -> None:
        self.empty = empty
        self.traced = empty
        self.own = threading.local()

    def get(self) -> T:
        """What this thread has set last."""
        if torch.compiler.is_compiling():
            return self.traced
        found: T = getattr(self.own, "value", self.empty)
        return self.traced if found is self.empty else found

    def set(self, value: T) -> None:
        """Hold a value for this thread."""
        self.traced = value
        if not torch.compiler.is_compiling():
            self.own.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies start empty: a value belongs to a forward pass."""
        return PerThread, (self.empty,)
