"""Read and write ranges of tensors with positioned system calls.

Files are not mapped: mapped pages count as the process's memory, and a merge would seem (and on a full machine be) as
large as its inputs. One descriptor per file serves all threads, since every call names its own position.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from wemoe_plugin.checkpoints.checkpoint import Checkpoint
from wemoe_plugin.checkpoints.header import ITEM_BYTES, StoredTensor, build_header
from wemoe_plugin.checkpoints.sources import AdaptedTensor, Source
from wemoe_plugin.errors import CheckpointError

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


class RangeReader:
    """Reads element ranges of stored tensors; open files are shared by all threads until the reader is closed."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._stack = ExitStack()
        self._descriptors: dict[Path, int] = {}
        try:
            for path in dict.fromkeys(files):
                descriptor = os.open(path, os.O_RDONLY)
                self._stack.callback(os.close, descriptor)
                self._descriptors[path] = descriptor
        except OSError as error:
            self._stack.close()
            raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def read_as(self, source: Source, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """Elements of a source in a given floating-point dtype, with its LoRA change added if it has one."""
        if isinstance(source, StoredTensor):
            return self.read(source, start, count).to(dtype)
        row = math.prod(source.shape[1:])
        first, last = start // row, -(-(start + count) // row)
        change = self._change(source, first, last, dtype).reshape(-1)[start - first * row :][:count]
        return self.read(source.stored, start, count).to(dtype).add_(change)

    def read_stored(self, source: Source, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """Elements as they are stored; those with a LoRA change are stored nowhere and come in ``dtype``."""
        if isinstance(source, StoredTensor):
            return self.read(source, start, count)
        return self.read_as(source, start, count, dtype)

    def _change(self, source: AdaptedTensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows of s·B·A or of its transpose, (rows, the rest)."""
        rank = source.down.shape[0]
        down = self.read(source.down, 0, source.down.elements).to(dtype).view(rank, -1)
        if source.transposed:
            up = self.read(source.up, 0, source.up.elements).to(dtype).view(-1, rank)
            return (down[:, first:last].T * source.scale) @ up.T
        up = self.read(source.up, first * rank, (last - first) * rank).to(dtype).view(-1, rank)
        return (up * source.scale) @ down

    def read(self, tensor: StoredTensor, start: int, count: int) -> Tensor:
        """Elements ``start`` to ``start + count`` of a tensor in storage order: a new 1-D tensor of its own dtype.

        Raises:
            CheckpointError: the file has become shorter than its header says.
        """
        result = torch.empty(count, dtype=TORCH_DTYPE[tensor.dtype])
        view = _bytes_of(result)
        position = tensor.offset + start * ITEM_BYTES[tensor.dtype]
        done = 0
        while done < len(view):
            got = os.preadv(self._descriptors[tensor.file], [view[done:]], position + done)
            if got == 0:
                raise CheckpointError(f"{tensor.file}: ends within {tensor.name!r}; it was changed during the merge")
            done += got
        return result


def read_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in memory, by the names the checkpoint gives them."""
    with RangeReader(file for source in checkpoint.tensors.values() for file in source.files) as reader:
        return {
            name: reader.read_stored(source, 0, source.elements, torch.float32).view(source.shape)
            for name, source in checkpoint.tensors.items()
        }


class TensorFile:
    """A safetensors file that is filled range by range, in any order and from any thread.

    Its header is written and its whole space allocated when it is created, so a full disk is found before any work.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        entries = list(tensors)
        header = build_header(entries, {"format": "pt"})
        self.path = path
        self._dtypes = {name: dtype for name, dtype, _ in entries}
        self._offsets: dict[str, int] = {}
        end = len(header)
        for name, dtype, shape in entries:
            self._offsets[name] = end
            end += torch.Size(shape).numel() * ITEM_BYTES[dtype]
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _allocate(self._descriptor, end)
            _write_all(self._descriptor, memoryview(header), 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Store ``values`` as the elements from ``start`` of a tensor, rounded to its dtype."""
        dtype = self._dtypes[name]
        data = values.detach().to("cpu", TORCH_DTYPE[dtype]).contiguous()
        _write_all(self._descriptor, _bytes_of(data), self._offsets[name] + start * ITEM_BYTES[dtype])

    def sync(self) -> None:
        """Bring the data to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Take the space; where that cannot be asked for, set the length, and blocks come as they are written."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        os.ftruncate(descriptor, size)
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:  # musl and some network file systems cannot
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, view: memoryview, position: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)
