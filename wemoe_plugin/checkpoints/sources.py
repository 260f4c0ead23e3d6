"""What a merge reads by ranges: a tensor in a file, or one with a LoRA change on top."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wemoe_plugin.checkpoints.header import StoredTensor


@dataclass(frozen=True)
class _ChangedTensor:
    """A stored tensor with a change on top; read by ranges like a `StoredTensor`."""

    stored: StoredTensor

    @property
    def change(self) -> tuple[StoredTensor, ...]:
        """What the change is computed from."""
        raise NotImplementedError

    @property
    def file(self) -> Path:
        return self.stored.file

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file, *(part.file for part in self.change))

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def elements(self) -> int:
        return self.stored.elements

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes + sum(part.nbytes for part in self.change)


@dataclass(frozen=True)
class AdaptedTensor(_ChangedTensor):
    """W + s·B·A, or for weights stored as (in, out) W + s·(B·A)ᵀ.

    Attributes:
        stored: W.
        down: A, (rank, in); for convolutions (rank, in, height, width).
        up: B, (out, rank).
        scale: s, alpha / rank or with rsLoRA alpha / √rank.
        transposed: whether the weight is stored as (in, out).
    """

    down: StoredTensor
    up: StoredTensor
    scale: float
    transposed: bool

    @property
    def change(self) -> tuple[StoredTensor, ...]:
        return (self.down, self.up)


@dataclass(frozen=True)
class ShiftedTensor(_ChangedTensor):
    """b + s·c: a bias and what a LoRA change adds to it (``lora_bias``).

    Attributes:
        stored: b, (out,).
        shift: c, (out,).
        scale: s, that of the weight's change.
    """

    shift: StoredTensor
    scale: float

    @property
    def change(self) -> tuple[StoredTensor, ...]:
        return (self.shift,)


Source = StoredTensor | AdaptedTensor | ShiftedTensor
"""Whatever a merge can read by ranges."""


def is_change_of(source: Source, base: Source) -> bool:
    """Whether a source is a base's tensor with a LoRA change on top, which then is the whole task vector."""
    if not isinstance(source, AdaptedTensor) or len(source.shape) != 2:
        return False
    return is_same(source.stored, base)


def is_same(source: Source, base: Source) -> bool:
    """Whether both are one tensor in one file."""
    if not (isinstance(source, StoredTensor) and isinstance(base, StoredTensor)):
        return False
    return (source.offset, source.shape, source.dtype) == (base.offset, base.shape, base.dtype) and (
        source.file == base.file or source.file.resolve() == base.file.resolve()
    )
