"""An output appears whole or not at all, and nothing that is not an earlier output is ever replaced."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from snapshots import tree

from wemoe_plugin.checkpoints import staging
from wemoe_plugin.checkpoints.manifest import doubt_output, write_manifest
from wemoe_plugin.checkpoints.staging import staged_directory, write_atomically
from wemoe_plugin.errors import PlanError


def write(out: Path, content: str, force: bool = False) -> None:
    with staged_directory(out, force, doubt_output) as stage:
        (stage.directory / "a").write_text(content)
        write_manifest(stage.directory, {})


def test_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with staged_directory(out, False, doubt_output) as stage:
        (stage.directory / "a").write_text("1")
        assert not out.exists()
        assert stage.directory.parent.parent == out.parent
    assert tree(tmp_path) == {"deep": b"", "deep/er": b"", "deep/er/out": b"", "deep/er/out/a": b"1"}


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_directory(tmp_path / "deep" / "out", False, doubt_output) as stage:
            (stage.directory / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert tree(tmp_path) == {}


def test_an_earlier_output_is_replaced_only_with_force_and_only_by_a_whole_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    before = tree(tmp_path)
    with pytest.raises(PlanError, match="exists; replace it with --force"):
        write(out, "new")
    with pytest.raises(ZeroDivisionError), staged_directory(out, True, doubt_output):
        raise ZeroDivisionError
    assert tree(tmp_path) == before
    write(out, "new", force=True)
    assert (out / "a").read_text() == "new"
    assert set(tree(tmp_path)) == set(before)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["thesis.tex"], r"this has no manifest\.json of ours"),
        (["manifest.json", "app.js"], r"this has no manifest\.json of ours"),
    ],
)
def test_force_never_deletes_what_is_not_ours(tmp_path: Path, names: list[str], reason: str) -> None:
    out = tmp_path / "home"
    out.mkdir()
    for name in names:
        (out / name).write_text('{"name": "app"}')
    before = tree(tmp_path)
    with pytest.raises(PlanError, match=reason):
        write(out, "new", force=True)
    assert tree(tmp_path) == before


def test_force_never_deletes_what_was_put_beside_an_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    (out / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(PlanError, match=r"this holds notes\.txt as well"):
        write(out, "new", force=True)
    assert tree(tmp_path) == before


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlanError, match="is not a directory"):
        write(tmp_path / "file", "new", force=True)
    assert (tmp_path / "file").read_text() == "x"


def test_what_appears_during_the_work_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def race() -> None:
        with staged_directory(out, False, doubt_output) as stage:
            (stage.directory / "a").write_text("1")
            out.mkdir()
            (out / "precious").write_text("x")

    with pytest.raises(PlanError, match="exists"):
        race()
    assert tree(tmp_path) == {"out": b"", "out/precious": b"x"}


def test_an_empty_directory_is_no_obstacle_but_the_current_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "1")
    assert (tmp_path / "out" / "a").read_text() == "1"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(PlanError, match="is the folder you are in"):
        write(Path(), "1")
    assert list(tmp_path.glob(".*")) == []


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"one")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomically(path, b"two")
    assert tree(tmp_path) == {"a": b"one"}


def leave(out: Path, made_from: str) -> None:
    """What a killed run leaves: content, journal and mark, and no lock."""
    with staged_directory(out, False, doubt_output, made_from=made_from) as stage:
        (stage.directory / "a").write_text("left")
        stage.journal.write_text("done")
        shutil.copytree(stage.directory.parent, out.parent / "copy")
    shutil.rmtree(out)
    (out.parent / "copy").rename(out.parent / f".{out.name}.partial")


def found(out: Path, **options: Any) -> set[str]:
    with staged_directory(out, False, doubt_output, **options) as stage:
        return {path.name for path in stage.directory.iterdir()} | {"journal"} & {
            path.name for path in stage.directory.parent.iterdir()
        }


def test_what_a_killed_run_left_is_there_again_only_to_resume_it(tmp_path: Path) -> None:
    leave(tmp_path / "out", "x")
    assert found(tmp_path / "out", made_from="x", resume=True) == {"a", "journal"}
    shutil.rmtree(tmp_path / "out")
    leave(tmp_path / "out", "x")
    assert found(tmp_path / "out", made_from="x") == set()
    shutil.rmtree(tmp_path / "out")
    assert found(tmp_path / "out", made_from="x", resume=True) == set()


def test_after_the_machine_went_down_nothing_counts_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path / "out", "x")
    monkeypatch.setattr(staging, "_boot", lambda: "another")
    assert found(tmp_path / "out", made_from="x", resume=True) == set()


def test_what_is_not_ours_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "thesis.tex").write_text("x")
    before = tree(tmp_path)
    with pytest.raises(PlanError, match=r"is in the way: it holds thesis\.tex, which is not ours"):
        write(tmp_path / "out", "new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("moment", [1, 2])
def test_an_interrupt_between_the_renames_of_force_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    write(tmp_path / "out", "old")
    before = tree(tmp_path)
    rename, calls = Path.rename, 0

    def interrupted(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        result = path if calls == moment == 2 else rename(path, target)
        if calls == moment:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "new", force=True)
    monkeypatch.undo()
    assert tree(tmp_path) == before
