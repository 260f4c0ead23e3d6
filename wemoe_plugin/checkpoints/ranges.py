"""Read and write ranges of tensors as bytes, with positioned system calls.

Files are not mapped: mapped pages count as the process's memory, and a merge would seem (and on a full machine be) as
large as its inputs. One descriptor per file serves all threads, since every call names its own position.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from wemoe_plugin.checkpoints.header import ITEM_BYTES, StoredTensor, build_header
from wemoe_plugin.errors import CheckpointError


@dataclass(frozen=True)
class FileStamp:
    """What tells whether a file is still the one whose header was read: its size and time of change (ns)."""

    size: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        return cls(status.st_size, status.st_mtime_ns)


def stamp_files(files: Iterable[Path]) -> dict[Path, FileStamp]:
    """The stamps of files as they are now.

    Raises:
        CheckpointError: one is gone.
    """
    stamps = {}
    for path in files:
        try:
            stamps[path] = FileStamp.of(path.stat())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return stamps


class RangeReader:
    """Reads element ranges of stored tensors; open files are shared by all threads until the reader is closed.

    Args:
        files: the files to read, each with its stamp if it must not have changed since.
        folder: where relative paths start; default the current one.
    """

    def __init__(self, files: Mapping[Path, FileStamp | None], folder: Path = Path()) -> None:
        self._stack = ExitStack()
        self._stamps = files
        self._descriptors: dict[Path, int] = {}
        try:
            for path in files:
                self._descriptors[path] = self._opened(folder, path)
            self.check_unchanged()
        except CheckpointError:
            self._stack.close()
            raise

    def _opened(self, folder: Path, path: Path) -> int:
        try:
            descriptor = os.open(folder / path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        self._stack.callback(os.close, descriptor)
        return descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def check_unchanged(self) -> None:
        """Compare every file with its stamp.

        Raises:
            CheckpointError: one has been changed.
        """
        for path, stamp in self._stamps.items():
            if stamp is not None and FileStamp.of(os.fstat(self._descriptors[path])) != stamp:
                raise CheckpointError(f"{path}: was changed while it was being merged; the result would mix two models")

    def fill(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """Read a tensor's bytes, from element ``start`` on, until a buffer of bytes is full.

        Raises:
            CheckpointError: the file has become shorter than its header says, or cannot be read.
        """
        position = tensor.offset + start * ITEM_BYTES[tensor.dtype]
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._descriptors[tensor.file], [buffer[done:]], position + done)
            except OSError as error:
                raise CheckpointError(f"{tensor.file}: cannot be read: {error.strerror}") from None
            if got == 0:
                raise CheckpointError(f"{tensor.file}: ends within {tensor.name!r}; it was changed during the merge")
            done += got


class TensorFile:
    """A safetensors file that is filled range by range, in any order and from any thread.

    Its header is written and its whole space allocated when it is made, so a full disk is found before any work. If the
    file is there already, what an earlier one of the same tensors has stored stays.

    Args:
        path: the file.
        tensors: (name, dtype, shape) of its tensors, in the order of their data.
        made: whether another process has made it already; it is then opened for its data alone.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, made: bool = False) -> None:
        entries = list(tensors)
        header = build_header(entries, {"format": "pt"})
        self.path = path
        self.dtypes = {name: dtype for name, dtype, _ in entries}
        self._offsets: dict[str, int] = {}
        end = len(header)
        for name, dtype, shape in entries:
            self._offsets[name] = end
            end += math.prod(shape) * ITEM_BYTES[dtype]
        self._descriptor = os.open(path, os.O_WRONLY if made else os.O_RDWR | os.O_CREAT, 0o666)
        if made:
            return
        try:
            _allocate(self._descriptor, end)
            _write_all(self._descriptor, memoryview(header), 0)
        except BaseException:
            os.close(self._descriptor)
            raise

    def put(self, name: str, start: int, data: memoryview) -> None:
        """Store bytes as the elements of a tensor from ``start`` on."""
        _write_all(self._descriptor, data, self._offsets[name] + start * ITEM_BYTES[self.dtypes[name]])

    def sync(self) -> None:
        """Bring the data to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its length and, where the system can, its blocks."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS has no such call
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)  # some network file systems


def _write_all(descriptor: int, view: memoryview, position: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)
