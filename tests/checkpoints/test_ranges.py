"""Space for an output is taken before it is filled, wherever the file system can."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wemoe_plugin.checkpoints.ranges import TensorFile
from wemoe_plugin.checkpoints.tensors import write


def answer(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", allocate, raising=False)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_where_space_cannot_be_asked_for_the_file_gets_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    answer(number, monkeypatch)
    file = TensorFile(tmp_path / "x.safetensors", [("w", "F32", (2,))])
    write(file, "w", 1, torch.ones(1))
    file.close()
    assert load_file(tmp_path / "x.safetensors")["w"].tolist() == [0, 1]


def test_a_full_disk_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(errno.ENOSPC, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        TensorFile(tmp_path / "x.safetensors", [("w", "F32", (2,))])
