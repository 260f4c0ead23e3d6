"""A model directory's files are files, and lie in it: nothing is read through a link that leads elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from wemoe_plugin.errors import CheckpointError


def is_there(path: Path) -> bool:
    """Whether anything is at a path; no name is so odd that asking is an error."""
    try:
        return path.exists()
    except OSError:
        return False


def check_is_file(path: Path) -> None:
    """Refuse what opens but is no file: a directory, a device, or a pipe nobody may ever write to.

    Raises:
        CheckpointError: it is one of these. What is absent passes, for the reader to say so.
    """
    if is_there(path) and not path.is_file():
        kind = "a directory" if path.is_dir() else "a pipe, a socket or a device"
        raise CheckpointError(f"{path}: is {kind}, not a file")


def file_in(directory: Path, name: str) -> Path | None:
    """The file of that name in a model directory; None if there is none.

    A link may lead to another file of the same directory, and in the hub's cache from a snapshot to the blobs of its
    repository. The directory itself may be reached through links.

    Raises:
        CheckpointError: it is a link that leads out of the directory or nowhere, or it is no file.
    """
    path = directory / name
    if not os.path.lexists(path):
        return None
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in _roots(Path(os.path.realpath(directory)))):
        raise CheckpointError(f"{path}: is a link to {real}, outside of the directory; put the file itself there")
    if not is_there(path):
        raise CheckpointError(f"{path}: is a link to {real}, where nothing is")
    check_is_file(path)
    return path


def _roots(directory: Path) -> list[Path]:
    """Where the files of a directory may lie: in it, or for a snapshot of the hub's cache in its repository's blobs."""
    snapshots = [p for p in directory.parents if p.name == "snapshots" and p.parent.name.startswith("models--")]
    return [directory, *(path.parent / "blobs" for path in snapshots[:1])]
