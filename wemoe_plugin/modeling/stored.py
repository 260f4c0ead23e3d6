"""Task vectors in an output directory, read expert by expert and range by range."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from wemoe_plugin.checkpoints.containment import file_in
from wemoe_plugin.checkpoints.header import FLOATS, StoredTensor, read_header
from wemoe_plugin.checkpoints.ranges import RangeReader
from wemoe_plugin.checkpoints.tensors import read, read_as
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.modeling.config import LayerConfig, WemoeConfig

Part = Callable[[int, int], Tensor]
"""Elements of one expert's task vector from a start on, as many as asked for: float32, 1-D."""


@dataclass(frozen=True)
class StoredVectors:
    """The task vectors of one parameter.

    Attributes:
        form: how they are kept; those of a bias are dense.
        parts: the tensors that hold them.
        lambdas: λₖ per expert of the static merge.
        ranks: of the low-rank form, per expert.
    """

    form: Literal["dense", "low_rank", "sparse"]
    parts: tuple[StoredTensor, ...]
    lambdas: tuple[float, ...]
    ranks: tuple[int, ...] = ()

    def factors(self, reader: RangeReader, k: int) -> tuple[Tensor, Tensor]:
        """Expert k's factors of the low-rank form, float32: (rank, columns) and (rank, rows) of the stored weight."""
        before, rank = sum(self.ranks[:k]), self.ranks[k]
        down, up = (
            read_as(reader, part, before * width, rank * width, torch.float32).view(rank, width)
            for part in self.parts
            for width in part.shape[1:]
        )
        return down, up

    def of_expert(self, reader: RangeReader, shape: tuple[int, ...], k: int) -> Part:
        """Expert k's task vector, by ranges of whole rows.

        Args:
            reader: of the directory's files.
            shape: of the parameter.
            k: the expert's place.
        """
        if self.form == "dense":
            (part,) = self.parts
            elements = part.elements // part.shape[0]
            return lambda start, count: read_as(reader, part, k * elements + start, count, torch.float32)
        if self.form == "low_rank":
            down, up = self.factors(reader, k)
            columns = shape[1]
            return lambda start, count: (up[:, start // columns : (start + count) // columns].T @ down).reshape(-1)
        kept = self.parts[0].shape[1]
        values = read_as(reader, self.parts[0], k * kept, kept, torch.float32)
        indices = read(reader, self.parts[1], k * kept, kept).long()
        check_indices(indices.unsqueeze(0), math.prod(shape), f"{self.parts[1].file}: {self.parts[1].name!r}")

        def spread(start: int, count: int) -> Tensor:
            first, last = torch.searchsorted(indices, torch.tensor([start, start + count])).tolist()
            part = torch.zeros(count)
            part[indices[first:last] - start] = values[first:last]
            return part

        return spread


def stored_vectors(directory: Path, config: WemoeConfig) -> dict[str, StoredVectors]:
    """All task vectors of an output directory, by the name of the parameter they move; reads headers only.

    Raises:
        CheckpointError: some are absent, or not what the configuration says.
    """
    stored: dict[str, StoredTensor] = {}
    for name in config.vector_files:
        path = file_in(directory, name)
        if path is None:
            raise CheckpointError(f"{directory / name}: no such file")
        stored |= read_header(path)
    found: dict[str, StoredVectors] = {}

    def take(*names: str) -> tuple[StoredTensor, ...]:
        absent = next((name for name in names if name not in stored), None)
        if absent is not None:
            raise CheckpointError(f"{directory}: the task vectors {absent!r} are absent")
        return tuple(stored[name] for name in names)

    for module in config.modules:
        for layer in module.layers:
            where = f"{module.path}.{layer.path}".rstrip(".")
            parts = take(*(f"{where}.weight.task_vectors{part}" for part in layer.parts))
            _check(layer, parts, len(config.experts))
            found[f"{where}.weight"] = StoredVectors(layer.form, parts, module.lambdas, layer.ranks or ())
            if layer.bias:
                bias = take(f"{where}.bias.task_vectors")
                _check_axes(bias[0], (len(config.experts), None), FLOATS)
                found[f"{where}.bias"] = StoredVectors("dense", bias, module.lambdas)
    return found


def _check(layer: LayerConfig, parts: tuple[StoredTensor, ...], experts: int) -> None:
    """See that the stored tensors are what the configuration says.

    Raises:
        CheckpointError: one has other axes, or another kind of numbers.
    """
    if layer.form == "dense":
        _check_axes(parts[0], (experts, None, None), FLOATS)
    elif layer.form == "sparse":
        _check_axes(parts[0], (experts, layer.count), FLOATS)
        _check_axes(parts[1], (experts, layer.count), ("I32",))
    else:
        for part in parts:
            _check_axes(part, (sum(layer.ranks or ()), None), FLOATS)


def _check_axes(tensor: StoredTensor, axes: tuple[int | None, ...], dtypes: tuple[str, ...]) -> None:
    fits = len(tensor.shape) == len(axes) and all(a in (None, b) for a, b in zip(axes, tensor.shape, strict=True))
    if not fits or tensor.dtype not in dtypes:
        wanted = ", ".join("any" if axis is None else str(axis) for axis in axes)
        raise CheckpointError(
            f"{tensor.file}: {tensor.name!r} is {tensor.dtype} of shape {list(tensor.shape)}; it must be "
            f"{' or '.join(dtypes)} of shape [{wanted}]"
        )


def check_indices(indices: Tensor, elements: int, name: str) -> None:
    """See that the positions of each expert's entries ascend and lie inside of the matrix, (experts, count).

    Raises:
        CheckpointError: they do not.
    """
    if not indices.numel():
        return
    ascending = bool((indices[:, 1:] > indices[:, :-1]).all())
    if not ascending or int(indices.min()) < 0 or int(indices.max()) >= elements:
        raise CheckpointError(f"{name}: positions must ascend, and lie in a matrix of {elements:,} elements")
