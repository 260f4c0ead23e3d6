"""An output directory that appears whole or not at all, and can be gone on with if its maker was killed.

While it is made, ``OUT`` has a sibling ``.OUT.partial`` with

    content/    what will become ``OUT`` by one rename
    journal     what is done of it
    mark        what it is made from
    old/        the earlier ``OUT`` that ``--force`` replaces, for the moment between two renames
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from wemoe_plugin.errors import PlanError

Doubt = Callable[[Path], str | None]
"""Says why a directory is not an earlier output of ours, or None if it is one."""

_PARTS = {"content", "journal", "mark", "old"}


@dataclass(frozen=True)
class Stage:
    """Where an output is made.

    Attributes:
        directory: to be filled; it becomes the output.
        journal: where to note what is done; a file that is there tells what an earlier run did.
    """

    directory: Path
    journal: Path


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
def staged_directory(
    path: Path, force: bool, doubt: Doubt, *, made_from: str = "", resume: bool = False
) -> Iterator[Stage]:
    """A place to make an output in; it becomes ``path`` on success and is removed on any failure.

    Only a killed process leaves one behind. The next run for the same output removes it, or goes on with it.

    Args:
        path: the output.
        force: replace an earlier output.
        doubt: looks at what is there.
        made_from: identifies everything the content depends on.
        resume: go on with what a killed run left, if there is any.

    Raises:
        PlanError: see `check_output`; another process is making this output; what a killed run left was made from
            something else; or the disk is full or cannot be written to.
    """
    missing = [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()]
    area = _area(path)
    if not os.path.lexists(area):
        check_output(path, force, doubt)
    try:
        with _locked(area, path):
            try:
                _recover(area, path)
                check_output(path, force, doubt)
                stage = _prepared(area, path, made_from, resume)
            except BaseException:
                with suppress(OSError):  # what an earlier run left stays
                    area.rmdir()
                raise
            try:
                yield stage
                check_output(path, force, doubt)
                _swap(area, path)
            finally:
                if (area / "old").exists() and not os.path.lexists(path):  # interrupted between two renames
                    (area / "old").rename(path)
                shutil.rmtree(area, ignore_errors=True)
    except BaseException as error:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            about = f" ({error.filename})" if error.filename else ""
            raise PlanError(f"{path}: cannot write the output: {error.strerror or error}{about}") from error
        raise


def clear_remains(path: Path) -> None:
    """Remove what a run left that was killed after its output was in place.

    Raises:
        PlanError: another process is making this output.
    """
    area = _area(path)
    if os.path.lexists(area):
        with _locked(area, path):
            _recover(area, path)
            if not (area / "content").exists():
                shutil.rmtree(area, ignore_errors=True)


def _area(path: Path) -> Path:
    return path.parent / f".{path.name or path.resolve().name}.partial"


@contextmanager
def _locked(area: Path, path: Path) -> Iterator[None]:
    """The place as this process's own: the lock lies on the folder and ends with the process, however it ends."""
    for _ in range(1000):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            area.mkdir(exist_ok=True)
            descriptor = os.open(area, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # its owner, or the owner of its folder, has just finished
        except OSError as error:
            raise PlanError(f"{path}: cannot be created: {error.strerror}") from None
        try:
            _lock(descriptor, path)
            if _is_at(descriptor, area):
                yield
                return
        finally:
            os.close(descriptor)
    raise PlanError(f"{path}: cannot be created: its folder disappears again and again")


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PlanError(f"{path}: another wemoe-merge is writing it; wait for it or choose another --out") from None
    except OSError:
        pass  # a file system without locks


def _is_at(descriptor: int, area: Path) -> bool:
    """Whether the folder that was opened is still the one of that name."""
    try:
        now = area.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), now)


def _recover(area: Path, path: Path) -> None:
    """Undo or finish what a process was killed in, so that at most unfinished content is left."""
    found = {entry.name for entry in area.iterdir()}
    halves = {name for name in found if name.startswith(".mark.")}  # a mark that was being written
    if strangers := found - halves - _PARTS:
        raise PlanError(f"{area}: is in the way: it holds {min(strangers)}, which is not ours")
    old = area / "old"
    if old.exists() and not os.path.lexists(path):
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    if not (area / "content").exists():
        halves |= {"journal", "mark"}
    for name in halves:
        (area / name).unlink(missing_ok=True)


def _prepared(area: Path, path: Path, made_from: str, resume: bool) -> Stage:
    stage = Stage(area / "content", area / "journal")
    mark = area / "mark"
    mine = {"made_from": made_from, "boot": _boot()}
    earlier = _read_mark(mark) if resume else None
    if earlier is not None and earlier.get("made_from") != made_from:
        raise PlanError(
            f"{path}: what the earlier run left was made from another recipe, other inputs or with other options; "
            "without --resume it is made anew"
        )
    if earlier != mine:  # nothing is there, or the machine went down and what it had written may be lost
        shutil.rmtree(stage.directory, ignore_errors=True)
        stage.journal.unlink(missing_ok=True)
        write_atomically(mark, json.dumps(mine).encode())
    stage.directory.mkdir(exist_ok=True)
    return stage


def _read_mark(path: Path) -> dict[str, str] | None:
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) else None


def _boot() -> str:
    """Identifies this run of this machine, where the system says."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _swap(area: Path, path: Path) -> None:
    """Give the content its name; what `check_output` allowed to be there moves aside first and back on a failure."""
    old = area / "old"
    try:
        if path.exists():
            path.rename(old)
        try:
            (area / "content").rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    except OSError as error:
        raise PlanError(f"{path}: cannot be put in place: {error.strerror}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Replace one file by new content in one step."""
    work = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        with work.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
