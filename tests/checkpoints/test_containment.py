"""Nothing is read through a link that leads out of a model's directory, and nothing that is not a file is opened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import open_clip_family, transformers_family
from snapshots import tree

from wemoe_plugin.checkpoints.checkpoint import open_checkpoint
from wemoe_plugin.checkpoints.companions import find_companions
from wemoe_plugin.checkpoints.containment import file_in
from wemoe_plugin.checkpoints.header import read_header
from wemoe_plugin.checkpoints.torch_file import read_torch_header
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.pipeline.convert import convert
from wemoe_plugin.recipe.loading import load_recipe

LINK = "is a link to .*, outside of the directory"


def move_out(path: Path) -> Path:
    """Put a file elsewhere and leave a link to it."""
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    target = path.rename(elsewhere / path.name)
    path.symlink_to(target)
    return target


def sharded(directory: Path) -> Path:
    base, _ = transformers_family(directory, 0)
    base.save_pretrained(directory / "sharded", max_shard_size="50KB")
    return directory / "sharded"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00002-of-*.safetensors"])
def test_a_link_out_of_a_directory_is_refused(tmp_path: Path, name: str) -> None:
    (path,) = sharded(tmp_path).glob(name)
    target = move_out(path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "sharded")
    assert str(caught.value).startswith(f"{path}: is a link to {target.resolve()}, outside of the directory")


def test_a_link_through_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "model" / "inner" / "up").symlink_to(tmp_path)
    (tmp_path / "model" / "config.json").symlink_to(Path("inner") / "up" / "secret")
    with pytest.raises(CheckpointError, match=LINK):
        file_in(tmp_path / "model", "config.json")


def test_a_folder_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    for name in ("model", "model-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "model-2" / "config.json").write_text("{}")
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "model-2" / "config.json")
    with pytest.raises(CheckpointError, match=LINK):
        file_in(tmp_path / "model", "config.json")


def test_links_within_a_directory_to_it_and_to_a_lone_file_are_fine(tmp_path: Path) -> None:
    open_clip_family(tmp_path, 0)
    weights = tmp_path / "base" / "open_clip_model.safetensors"
    weights.rename(weights.with_name("weights.safetensors"))
    weights.symlink_to("weights.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "lone.safetensors").symlink_to(weights)
    names = open_checkpoint(tmp_path / "base").tensors.keys()
    assert open_checkpoint(tmp_path / "link").tensors.keys() == names
    assert open_checkpoint(tmp_path / "folder" / "lone.safetensors").tensors.keys() == names


def hub_snapshot(directory: Path, blobs: Path) -> Path:
    """What huggingface_hub leaves: links from a snapshot to files that are named by their hash."""
    transformers_family(directory, 0)
    snapshot = directory / "models--someone--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted((directory / "base").iterdir())):
        shutil.copyfile(path, blobs / f"{i:064}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{i:064}", snapshot))
    return snapshot


def test_the_hubs_cache_is_read(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, tmp_path / "models--someone--tiny" / "blobs")
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        assert open_checkpoint(path).library == "transformers"
        assert "config.json" in {companion.name for companion in find_companions(path)}


@pytest.mark.parametrize("blobs", ["models--someone--else/blobs", "models--someone--tiny/other", "blobs"])
def test_a_snapshot_that_leads_elsewhere_is_refused(tmp_path: Path, blobs: str) -> None:
    snapshot = hub_snapshot(tmp_path, tmp_path / blobs)
    with pytest.raises(CheckpointError, match=LINK):
        open_checkpoint(snapshot)


def test_blobs_that_are_a_link_are_refused(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path, tmp_path / "models--someone--tiny" / "blobs")
    blobs = tmp_path / "models--someone--tiny" / "blobs"
    blobs.symlink_to(blobs.rename(tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match=LINK):
        open_checkpoint(snapshot)


def test_a_link_beside_the_weights_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    open_clip_family(tmp_path, 1)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    move_out(tmp_path / "base" / "tokenizer.json")
    (tmp_path / "recipe.yaml").write_text("base_model: base\nmodels: [{model: e0}]\nmerge_method: task_arithmetic\n")
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pt")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=LINK):
        plan_merge(load_recipe(tmp_path / "recipe.yaml"))
    with pytest.raises(CheckpointError, match=LINK):
        convert(tmp_path / "x.pt", tmp_path / "out", tmp_path / "base")
    assert tree(tmp_path) == before


def test_what_is_not_copied_may_be_a_link(tmp_path: Path) -> None:
    open_clip_family(tmp_path, 0)
    (tmp_path / "base" / "README.md").symlink_to("/etc/hostname")
    (tmp_path / "base" / "folder").symlink_to("/etc")
    (tmp_path / "base" / "dangling").symlink_to("nowhere")
    assert [path.name for path in find_companions(tmp_path / "base")] == ["open_clip_config.json"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is a pipe, a socket or a device, not a file"),
        (Path.mkdir, "is a directory, not a file"),
        (lambda path: path.symlink_to("nowhere"), "is a link to .*nowhere, where nothing is"),
        (lambda path: path.symlink_to(path.name), "is a link to .*, where nothing is"),
        (lambda path: path.symlink_to("/dev/zero"), LINK),
    ],
    ids=["pipe", "directory", "dangling link", "link to itself", "device"],
)
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_config.json"])
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], object], message: str, name: str
) -> None:
    open_clip_family(tmp_path, 0)
    (tmp_path / "base" / name).unlink()
    make(tmp_path / "base" / name)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "base")


@pytest.mark.parametrize("read", [open_checkpoint, read_header, read_torch_header])
def test_a_lone_pipe_is_refused_at_once(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is a pipe"):
        read(tmp_path / "x.pt")
