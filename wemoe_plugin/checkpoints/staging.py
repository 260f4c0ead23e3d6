"""An output directory that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wemoe_plugin.errors import PlanError

Doubt = Callable[[Path], str | None]
"""Says why a directory is not an earlier output of ours, or None if it is one."""


def check_output(path: Path, force: bool, doubt: Doubt) -> None:
    """Refuse an output that is in the way.

    Args:
        path: where the output shall appear.
        force: whether an earlier output may be replaced.
        doubt: looks at what is there.

    Raises:
        PlanError: something is there and ``force`` is not given, or it is not an earlier output of ours.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise PlanError(f"{path}: exists and is not a directory; choose another --out")
    if path.resolve() == Path.cwd():
        raise PlanError(f"{path}: is the folder you are in; choose one below it with --out")
    if not any(path.iterdir()):
        return
    if not force:
        raise PlanError(f"{path}: exists; replace it with --force or choose another --out")
    if reason := doubt(path):
        raise PlanError(f"{path}: --force replaces earlier outputs only, and {reason}")


@contextmanager
def staged_directory(path: Path, force: bool, doubt: Doubt) -> Iterator[Path]:
    """A new sibling directory to fill; it is renamed to ``path`` on success and removed on any failure.

    Raises:
        PlanError: see `check_output`; or the parent cannot be written to.
    """
    check_output(path, force, doubt)
    missing = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    work = _sibling(path, "partial")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir()
        except OSError as error:
            raise PlanError(f"{path}: cannot be created: {error.strerror}") from None
        yield work
        check_output(path, force, doubt)
        _swap(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for parent in missing:
            try:
                parent.rmdir()
            except OSError:
                break
        raise


def _swap(work: Path, path: Path) -> None:
    """Rename ``work`` to ``path``; what `check_output` allowed to be there moves aside first and back on a failure."""
    old = _sibling(path, "old")
    try:
        if path.exists():
            path.rename(old)
        try:
            work.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    except OSError as error:
        raise PlanError(f"{path}: cannot be put in place: {error.strerror}") from None
    shutil.rmtree(old, ignore_errors=True)


def _sibling(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.{kind}"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace one file by new content in one step."""
    work = _sibling(path, "partial")
    try:
        with work.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
