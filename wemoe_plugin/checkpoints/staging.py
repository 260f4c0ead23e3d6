"""An output directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wemoe_plugin.errors import PlanError


def check_output(path: Path, force: bool, marker: str = "manifest.json") -> None:
    """Refuse an output that is in the way.

    Args:
        path: where the output shall appear.
        force: whether an earlier output may be replaced.
        marker: the file that shows a directory to be an earlier output.

    Raises:
        PlanError: something is there already and ``force`` is not given, or it is not an earlier output.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise PlanError(f"{path}: exists and is not a directory; choose another --out")
    if not force and any(path.iterdir()):
        raise PlanError(f"{path}: exists; replace it with --force or choose another --out")
    if any(path.iterdir()) and not (path / marker).is_file():
        raise PlanError(f"{path}: --force replaces earlier outputs only, and this has no {marker}")


@contextmanager
def staged_directory(path: Path, force: bool = False, marker: str = "manifest.json") -> Iterator[Path]:
    """A new sibling directory to fill; it is renamed to ``path`` on success and removed on any failure.

    Raises:
        PlanError: see `check_output`; or the parent cannot be written to.
    """
    check_output(path, force, marker)
    missing = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise PlanError(f"{path}: cannot be created: {error.strerror}") from None
    try:
        yield work
        work.chmod(0o777 & ~_umask())
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
    if not os.path.lexists(path):
        work.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(old / path.name)
    try:
        work.rename(path)
    except OSError:
        (old / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def write_atomically(path: Path, data: bytes) -> None:
    """Replace one file by new content in one step."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
