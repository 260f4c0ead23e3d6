"""An output appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from snapshots import tree

from wemoe_plugin.checkpoints.staging import staged_directory, write_atomically
from wemoe_plugin.errors import PlanError


def test_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with staged_directory(out) as work:
        (work / "a").write_text("1")
        assert not out.exists()
        assert work.parent == out.parent
    assert tree(tmp_path) == {"deep": b"", "deep/er": b"", "deep/er/out": b"", "deep/er/out/a": b"1"}


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_directory(tmp_path / "deep" / "out") as work:
            (work / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert tree(tmp_path) == {}


def test_an_earlier_output_is_replaced_only_with_force_and_only_by_a_whole_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_directory(out) as work:
        (work / "manifest.json").write_text("old")
    with pytest.raises(PlanError, match="exists; replace it with --force"), staged_directory(out):
        pass
    with pytest.raises(ZeroDivisionError), staged_directory(out, force=True):
        raise ZeroDivisionError
    assert tree(tmp_path) == {"out": b"", "out/manifest.json": b"old"}
    with staged_directory(out, force=True) as work:
        (work / "new").write_text("new")
    assert tree(tmp_path) == {"out": b"", "out/new": b"new"}


def test_force_never_deletes_what_is_not_ours(tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(PlanError, match=r"this has no manifest\.json"), staged_directory(out, force=True):
        pass
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(PlanError, match="is not a directory"), staged_directory(file, force=True):
        pass
    assert (out / "thesis.tex").read_text() == file.read_text() == "x"


def test_an_empty_directory_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out") as work:
        (work / "a").write_text("1")
    assert tree(tmp_path) == {"out": b"", "out/a": b"1"}


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"one")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomically(path, b"two")
    assert tree(tmp_path) == {"a": b"one"}
