"""Model directories as the libraries write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hostile import cases, json_object, odd_json, refusal
from hypothesis import given
from hypothesis import strategies as st
from models import open_clip_family, save_open_clip, save_state, transformers_family

from wemoe_plugin.checkpoints.checkpoint import open_checkpoint
from wemoe_plugin.checkpoints.tensors import read_tensors
from wemoe_plugin.errors import CheckpointError


def test_open_clip_directory(tmp_path: Path) -> None:
    (model,) = open_clip_family(tmp_path, 0)
    checkpoint = open_checkpoint(tmp_path / "base")
    assert checkpoint.library == "open_clip"
    assert checkpoint.config["model_cfg"]["embed_dim"] == 16
    assert all(torch.equal(model.state_dict()[n], t) for n, t in read_tensors(checkpoint).items())


def test_transformers_directory_in_one_file_or_sharded(tmp_path: Path) -> None:
    base, _ = transformers_family(tmp_path, 0)
    base.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    whole, sharded = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "sharded")
    assert whole.library == sharded.library == "transformers"
    first, second = read_tensors(whole), read_tensors(sharded)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_lone_file(tmp_path: Path) -> None:
    open_clip_family(tmp_path, 0)
    checkpoint = open_checkpoint(tmp_path / "base" / "open_clip_model.safetensors")
    assert checkpoint.library is None
    assert "visual.proj" in checkpoint.tensors


def sharded(tmp_path: Path) -> Path:
    base, _ = transformers_family(tmp_path, 0)
    base.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded"


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    directory = sharded(tmp_path)
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"the shard {shard.name} is listed but absent"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: dict.fromkeys(m, "../base/model.safetensors"), "lies outside of the directory"),
        (lambda m: {**m, "ghost": next(iter(m.values()))}, "'ghost' is listed in"),
        (lambda m: ["x"], "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    directory = sharded(tmp_path)
    index = directory / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    index.write_text(json.dumps({**data, "weight_map": change(data["weight_map"])}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory or file"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"neither config\.json \(transformers\) nor open_clip_config\.json"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "epoch_3.pt").write_text("x")
    with pytest.raises(CheckpointError, match=r"no weights.*there is epoch_3\.pt: name such a file itself"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"not a torch file of version 1\.6 or later"):
        open_checkpoint(tmp_path / "empty" / "epoch_3.pt")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="neither a safetensors file nor a torch file"):
        open_checkpoint(tmp_path / "notes.txt")


def test_the_name_open_clip_itself_prefers_comes_first(tmp_path: Path) -> None:
    (model,) = open_clip_family(tmp_path, 0)
    directory = save_open_clip(model, tmp_path / "two")
    (directory / "model.safetensors").write_bytes(b"junk")
    assert open_checkpoint(directory).tensors["visual.proj"].file.name == "open_clip_model.safetensors"


def opens_or_is_refused(path: Path) -> None:
    message = refusal(lambda: open_checkpoint(path), CheckpointError)
    assert message is None or message.startswith(str(path))


shards = st.sampled_from(['"a.safetensors"', '"config.json"', '"link.bin"', '"folder"', '"../a"', '"."', '".."', '""'])
tensor_names = st.sampled_from(['"w"', '"ghost"', '"module.w"'])
weight_maps = st.builds(json_object, st.lists(st.tuples(tensor_names, shards | odd_json), max_size=3)) | odd_json


@given(st.builds(lambda weight_map: json_object([('"weight_map"', weight_map)]), weight_maps) | odd_json)
@cases("indexes")
def test_any_index_is_read_or_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "folder").mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text("{}")
    save_state({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "link.bin").unlink(missing_ok=True)
    (tmp_path / "link.bin").symlink_to("/etc/hostname")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    opens_or_is_refused(tmp_path)


@given(st.builds(str.encode, odd_json) | st.binary(max_size=20), st.sampled_from(["config", "open_clip_config"]))
@cases("configurations")
def test_any_configuration_is_read_or_refused(tmp_path: Path, config: bytes, name: str) -> None:
    save_state({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / f"{name}.json").write_bytes(config)
    opens_or_is_refused(tmp_path)


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "digits-lora").mkdir()
    (tmp_path / "digits-lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"a PEFT adapter, not a model; name the model it is for, too: MODEL\+digits-lora"
    ):
        open_checkpoint(tmp_path / "digits-lora")
