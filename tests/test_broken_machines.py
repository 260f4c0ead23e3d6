"""Killed, full, read-only, disturbed: no output is ever half there, and inputs are never touched."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from models import open_clip_family
from snapshots import tree

from wemoe_plugin.checkpoints.manifest import doubt_output
from wemoe_plugin.checkpoints.staging import staged_directory
from wemoe_plugin.errors import CheckpointError, WemoeError
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe

Command = Callable[..., tuple[int, str, str]]
KILLS = int(os.environ.get("WEMOE_KILLS", "6"))
"""Moments at which a merge is killed; each takes about a second."""

RECIPE = """\
base_model: base
models: [{model: e0}, {model: e1}]
merge_method: task_arithmetic
parameters: {lambda: 0.3}
"""

DEADLY = """\
import os, pathlib, signal, sys  # pathlib of Python 3.10 would take what is put in place below for methods
calls, fatal = 0, int(sys.argv.pop(1))
def deadly(name):
    call = getattr(os, name)
    def counting(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    setattr(os, name, counting)
for name in ("pwrite", "preadv", "write", "fsync", "posix_fallocate", "mkdir", "rename", "replace", "rmdir", "unlink"):
    deadly(name)
from wemoe_plugin.cli import main
try:
    main(sys.argv[1:])
finally:
    if not fatal:
        print(calls)
"""
"""A merge that dies at its n-th call to the system, or counts them."""


def merged(directory: Path, *options: str, fatal: int = 0) -> subprocess.CompletedProcess[str]:
    args = [str(directory / "recipe.yaml"), "--out", str(directory / "out"), "--quiet", *options]
    command = [sys.executable, "-c", DEADLY, str(fatal), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    open_clip_family(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_killed_at_any_moment_it_can_be_resumed_to_the_same_bytes(family: Path) -> None:
    before = tree(family)
    total = int(merged(family).stdout)
    expected = digest(family / "out")
    for path in (family / "out").iterdir():
        path.unlink()
    (family / "out").rmdir()
    moments = random.Random(0).sample(range(1, total + 1), KILLS)
    for moment in [*moments, total - 1]:
        done = merged(family, fatal=moment)
        assert done.returncode == -9
        assert {n: c for n, c in tree(family).items() if not n.startswith((".out.partial", "out"))} == before
        whole = (family / "out").exists()
        assert not whole or digest(family / "out") == expected  # killed while it cleaned up
        done = merged(family, "--resume")
        assert (done.returncode, done.stderr) == (0, "")
        assert digest(family / "out") == expected
        assert set(tree(family)) == {*before, "out", *(f"out/{name}" for name in expected)}
        for path in (family / "out").iterdir():
            path.unlink()
        (family / "out").rmdir()


def test_what_a_killed_run_left_is_made_anew_without_resume(family: Path) -> None:
    assert merged(family, fatal=30).returncode == -9
    assert (family / ".out.partial").is_dir()
    assert merged(family).returncode == 0
    assert not (family / ".out.partial").exists()


def test_what_was_made_from_something_else_is_not_gone_on_with(family: Path) -> None:
    assert merged(family, fatal=30).returncode == -9
    (family / "recipe.yaml").write_text(RECIPE.replace("0.3", "0.4"))
    left = tree(family)
    done = merged(family, "--resume")
    assert done.returncode == 2
    assert "was made from another recipe, other inputs or with other options" in done.stderr
    assert tree(family) == left


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    point = tmp_path / "disk"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(point)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_a_full_disk(family: Path, small_disk: Path, command: Command) -> None:
    before = tree(family)
    status, _, err = command(family / "recipe.yaml", "--out", small_disk / "deep" / "out")
    assert status == 2
    assert "cannot write the output: No space left on device" in err
    assert tree(family) == before


def test_a_full_disk_after_the_weights(family: Path, small_disk: Path, command: Command) -> None:
    """The small files need room as well."""
    need = plan_merge(load_recipe(family / "recipe.yaml")).bytes_written
    subprocess.run(["mount", "-o", f"remount,size={(need // 4096 + 2) * 4096}", str(small_disk)], check=True)
    before = tree(family)
    status, _, err = command(family / "recipe.yaml", "--out", small_disk / "out")
    assert status == 2
    assert "No space left on device" in err
    assert tree(family) == before


def test_a_disk_that_cannot_be_written(family: Path, small_disk: Path, command: Command) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, _, err = command(family / "recipe.yaml", "--out", small_disk / "out")
    assert status == 2
    assert "out: cannot be created: Read-only file system" in err


def test_a_limit_on_the_size_of_files(family: Path) -> None:
    """Quotas answer like this, and need no right to mount."""
    before = tree(family)
    limit = (100_000, 100_000)
    args = [str(family / "recipe.yaml"), "--out", str(family / "deep" / "out")]
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from wemoe_plugin.cli import main; main(sys.argv[1:])", *args],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot write the output: File too large" in done.stderr
    assert tree(family) == before


def changed(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (changed, "was changed while it was being merged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "was changed while it was being merged"),
        (Path.unlink, "cannot be read: No such file or directory"),
    ],
)
def test_an_input_that_changes_between_plan_and_merge(
    family: Path, disturb: Callable[[Path], object], message: str
) -> None:
    source = load_recipe(family / "recipe.yaml")
    plan = plan_merge(source)
    path = family / "e1" / "open_clip_model.safetensors"
    disturb(path)
    before = tree(family)
    with pytest.raises(CheckpointError) as caught:
        merge(source, plan, family / "out")
    assert str(caught.value).startswith(f"{path}: {message}")
    assert tree(family) == before


def test_an_input_that_changes_during_the_merge(family: Path) -> None:
    source = load_recipe(family / "recipe.yaml")
    path = family / "e1" / "open_clip_model.safetensors"

    def touch(_: int) -> None:
        os.utime(path, ns=(0, 12345))

    before = tree(family)
    with pytest.raises(CheckpointError, match="was changed while it was being merged"):
        merge(source, plan_merge(source), family / "out", progress=touch)
    assert tree(family) == before


def test_two_runs_into_one_output(family: Path, command: Command) -> None:
    with staged_directory(family / "out", False, doubt_output) as stage:
        (stage.directory / "x").write_text("first")
        status, _, err = command(family / "recipe.yaml", "--out", family / "out")
    assert status == 2
    assert "out: another wemoe-merge is writing it; wait for it or choose another --out" in err
    assert tree(family / "out") == {"x": b"first"}


def test_an_earlier_output_that_was_being_replaced_comes_back(family: Path) -> None:
    """Killed between the two renames of --force, the old output is aside and the new one not yet in place."""
    assert merged(family).returncode == 0
    before = digest(family / "out")
    (family / ".out.partial").mkdir()
    (family / "out").rename(family / ".out.partial" / "old")
    with (
        pytest.raises(WemoeError, match="exists; replace it with --force"),
        staged_directory(family / "out", False, doubt_output),
    ):
        pass
    assert digest(family / "out") == before


def test_a_finished_merge_is_not_taken_for_that_of_other_inputs(family: Path, command: Command) -> None:
    assert command(family / "recipe.yaml", "--out", family / "out", "--quiet")[0] == 0
    status, said, _ = command(family / "recipe.yaml", "--out", family / "out", "--resume")
    assert (status, "merged already" in said) == (0, True)
    changed(family / "e1" / "open_clip_model.safetensors")
    status, _, err = command(family / "recipe.yaml", "--out", family / "out", "--resume")
    assert status == 2
    assert "exists; replace it with --force" in err


def test_force_does_not_replace_an_input(family: Path, command: Command) -> None:
    assert command(family / "recipe.yaml", "--out", family / "first", "--quiet")[0] == 0
    (family / "second.yaml").write_text(RECIPE.replace("base_model: base", "base_model: first"))
    before = tree(family)
    status, _, err = command(family / "second.yaml", "--out", family / "first", "--force")
    assert status == 2
    assert "first: holds open_clip_model.safetensors, an input of this merge" in err
    assert tree(family) == before
