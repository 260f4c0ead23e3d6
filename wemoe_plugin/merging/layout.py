"""Which file every written tensor goes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wemoe_plugin.checkpoints.header import ITEM_BYTES
from wemoe_plugin.merging.operations import OutputTensor


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file and its tensors, in the order of their data."""

    name: str
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def lay_out(stem: str, tensors: Iterable[OutputTensor], shard_bytes: int | None) -> tuple[OutputFile, ...]:
    """Distribute tensors over ``stem.safetensors``, or over numbered shards of at most ``shard_bytes`` each.

    Wide elements come first in each file, so that every tensor is aligned to its element size.
    """
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shard_bytes is not None and shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    files = []
    for i, shard in enumerate(shards):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        files.append(OutputFile(name, tuple(sorted(shard, key=lambda t: -ITEM_BYTES[t.dtype]))))
    return tuple(files)
