"""Which pieces of a merge are done, on disk, so that a merge that was killed can go on."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from wemoe_plugin.merging.work import Piece

_RECORD = struct.Struct("<QQQ")


class Journal:
    """A file that grows by one record for every piece of work whose result is in the output's files.

    A record is appended by one system call after those of the result, so what is in the journal is in the files, too,
    for as long as the machine itself stays up.

    Args:
        path: the file; made if it is absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._descriptor)

    def done(self) -> frozenset[Piece]:
        """The pieces that are done; half a record at the end counts for nothing."""
        data = self.path.read_bytes()
        whole = len(data) - len(data) % _RECORD.size
        if whole < len(data):
            os.ftruncate(self._descriptor, whole)
        return frozenset(Piece(*record) for record in _RECORD.iter_unpack(data[:whole]))

    def note(self, piece: Piece) -> None:
        """Remember that a piece is done; from any thread."""
        os.write(self._descriptor, _RECORD.pack(*piece))
