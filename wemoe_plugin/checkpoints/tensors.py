"""Ranges of stored tensors as torch tensors, LoRA changes added on the way."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wemoe_plugin.checkpoints.checkpoint import Checkpoint
from wemoe_plugin.checkpoints.header import StoredTensor
from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.checkpoints.sources import AdaptedTensor, ShiftedTensor, Source

TORCH_DTYPE: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""From safetensors' element types to torch's."""


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read(reader: RangeReader, tensor: StoredTensor, start: int, count: int) -> Tensor:
    """Elements ``start`` to ``start + count`` of a tensor in storage order: a new 1-D tensor of its own dtype.

    Raises:
        CheckpointError: the file has become shorter than its header says.
    """
    result = torch.empty(count, dtype=TORCH_DTYPE[tensor.dtype])
    reader.fill(tensor, start, _bytes_of(result))
    return result


def read_as(reader: RangeReader, source: Source, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Elements of a source in a given floating-point dtype, with its LoRA change added if it has one."""
    if isinstance(source, StoredTensor):
        return read(reader, source, start, count).to(dtype)
    if isinstance(source, ShiftedTensor):
        shift = read(reader, source.shift, start, count).to(dtype)
        return read(reader, source.stored, start, count).to(dtype).add_(shift, alpha=source.scale)
    row = math.prod(source.shape[1:])
    first, last = start // row, -(-(start + count) // row)
    change = _change(reader, source, first, last, dtype).reshape(-1)[start - first * row :][:count]
    return read(reader, source.stored, start, count).to(dtype).add_(change)


def read_stored(reader: RangeReader, source: Source, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Elements as they are stored; those with a LoRA change are stored nowhere and come in ``dtype``."""
    if isinstance(source, StoredTensor):
        return read(reader, source, start, count)
    return read_as(reader, source, start, count, dtype)


def read_factors(reader: RangeReader, source: AdaptedTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A LoRA change as factors of the weight as it is stored: (rank, columns) and (rank, rows), change = upᵀ down."""
    rank = source.down.shape[0]
    down = read(reader, source.down, 0, source.down.elements).to(dtype).view(rank, -1)
    up = read(reader, source.up, 0, source.up.elements).to(dtype).view(-1, rank).T
    if source.transposed:
        return up * source.scale, down
    return down, up * source.scale


def _change(reader: RangeReader, source: AdaptedTensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows of s·B·A or of its transpose, (rows, the rest)."""
    rank = source.down.shape[0]
    down = read(reader, source.down, 0, source.down.elements).to(dtype).view(rank, -1)
    if source.transposed:
        up = read(reader, source.up, 0, source.up.elements).to(dtype).view(-1, rank)
        return (down[:, first:last].T * source.scale) @ up.T
    up = read(reader, source.up, first * rank, (last - first) * rank).to(dtype).view(-1, rank)
    return (up * source.scale) @ down


def read_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in memory, by the names the checkpoint gives them."""
    files = {file: None for source in checkpoint.tensors.values() for file in source.files}
    with RangeReader(files) as reader:
        return {
            name: read_stored(reader, source, 0, source.elements, torch.float32).view(source.shape)
            for name, source in checkpoint.tensors.items()
        }


def write(file: TensorFile, name: str, start: int, values: Tensor) -> None:
    """Store ``values`` as the elements from ``start`` of a tensor, rounded to its dtype."""
    data = values.detach().to("cpu", TORCH_DTYPE[file.dtypes[name]]).contiguous()
    file.put(name, start, _bytes_of(data))
