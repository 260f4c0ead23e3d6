"""Every kind of bad input has one clear message, exit status 2, and leaves the file system as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import save_state
from safetensors.torch import load_file
from snapshots import tree

Command = Callable[..., tuple[int, str, str]]


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def weights(demo: Path, name: str) -> Path:
    return demo / "models" / name / "open_clip_model.safetensors"


def change_weights(demo: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(weights(demo, name))
    change(state)
    save_state(state, weights(demo, name))


def link(path: Path) -> None:
    """Put a file of a model into the demo's own folder and leave a link to it."""
    demo = path.parents[2]
    path.symlink_to(path.rename(demo / path.name))


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 20))


def shard(demo: Path, name: str = "model-00001-of-00001.safetensors") -> None:
    """Make the base a transformers directory whose index names a shard that is not there, or another file."""
    base = demo / "models" / "base"
    remove(base / "open_clip_config.json")
    remove(weights(demo, "base"))
    (base / "config.json").write_text("{}")
    index = {"weight_map": {"w": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


BAD_INPUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown key": (
        lambda d: edit(d / "recipe.yaml", ("merge_method: task", "merge_metod: task")),
        "DIR/recipe.yaml:10: merge_metod: unknown key; did you mean 'merge_method'?",
    ),
    "missing recipe": (lambda d: remove(d / "recipe.yaml"), "DIR/recipe.yaml: no such file"),
    "missing directory": (
        lambda d: remove(d / "models" / "shapes"),
        "DIR/recipe.yaml:5: DIR/models/shapes: no such directory or file",
    ),
    "missing weights": (lambda d: remove(weights(d, "shapes")), "DIR/models/shapes: no weights: expected"),
    "missing tasks file": (
        lambda d: remove(d / "tasks.yaml"),
        "DIR/recipe.yaml:21: tasks: DIR/tasks.yaml: no such file",
    ),
    "absent shard": (shard, "the shard model-00001-of-00001.safetensors is listed but absent"),
    "a shard outside": (
        lambda d: shard(d, "../shapes/open_clip_model.safetensors"),
        "the shard '../shapes/open_clip_model.safetensors' lies outside of the directory",
    ),
    "weights that are a link": (
        lambda d: link(weights(d, "shapes")),
        "DIR/models/shapes/open_clip_model.safetensors: is a link to DIR/open_clip_model.safetensors, outside of the",
    ),
    "a tokenizer that is a link": (
        lambda d: link(d / "models" / "base" / "tokenizer.json"),
        "DIR/models/base/tokenizer.json: is a link to DIR/tokenizer.json, outside of the directory",
    ),
    "weights that are a pipe": (
        lambda d: (remove(weights(d, "shapes")), os.mkfifo(weights(d, "shapes"))),
        "DIR/models/shapes/open_clip_model.safetensors: is a pipe, a socket or a device, not a file",
    ),
    "a tag that calls code": (
        lambda d: edit(d / "recipe.yaml", ("merge_method: task", "dtype: !!python/object/apply:os.system [ls]\nx: ")),
        "DIR/recipe.yaml:10: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed",
    ),
    "an alias bomb": (
        lambda d: (d / "recipe.yaml").write_text(BOMB),
        "DIR/recipe.yaml:1: more than 100,000 values once aliases are followed",
    ),
    "truncated file": (
        lambda d: weights(d, "shapes").write_bytes(weights(d, "shapes").read_bytes()[:-100]),
        "DIR/models/shapes/open_clip_model.safetensors: not a whole safetensors file: its tensors end at byte",
    ),
    "garbage file": (
        lambda d: weights(d, "shapes").write_bytes(b"garbage, not tensors"),
        "DIR/models/shapes/open_clip_model.safetensors: not a whole safetensors file: its header claims",
    ),
    "another shape": (
        lambda d: change_weights(d, "shapes", lambda s: s.update({"visual.proj": torch.zeros(64, 64)})),
        "DIR/models/shapes (shapes): 'visual.proj' has shape [64, 64], the base [128, 64]",
    ),
    "missing tensor": (
        lambda d: change_weights(d, "shapes", lambda s: s.pop("visual.proj")),
        "DIR/models/shapes (shapes): lacks 'visual.proj', which the base and other experts have",
    ),
    "extra tensor": (
        lambda d: change_weights(d, "shapes", lambda s: s.update(extra=torch.zeros(1))),
        "DIR/models/shapes (shapes): has 'extra', which the base DIR/models/base has not",
    ),
    "rule that matches nothing": (
        lambda d: edit(d / "recipe.yaml", ("visual.**.mlp", "vision.**.mlp")),
        "DIR/recipe.yaml:15: rules[0].match 'vision.**.mlp' matches no tensor of DIR/models/base",
    ),
    "no Linear layers": (
        lambda d: edit(d / "recipe.yaml", ("visual.**.mlp", "visual.conv1")),
        "DIR/recipe.yaml:15: rules[0]: the module visual.conv1 has no Linear layers",
    ),
    "NaN": (
        lambda d: change_weights(d, "shapes", lambda s: s["visual.proj"].view(-1)[5].fill_(float("nan"))),
        "DIR/models/shapes/open_clip_model.safetensors: 'visual.proj' holds NaN",
    ),
    "infinity": (
        lambda d: change_weights(d, "base", lambda s: s["visual.proj"].view(-1)[5].fill_(float("inf"))),
        "DIR/models/base/open_clip_model.safetensors: 'visual.proj' holds infinity",
    ),
    "no tasks for tuning": (
        lambda d: edit(d / "recipe.yaml", ("tasks: tasks.yaml\n", "")),
        "tuning: there are no tasks to tune on; add tasks: with unlabeled data",
    ),
    "a label outside of the class names": (
        lambda d: edit(d / "tasks.yaml", (', "nine"]', "]")),
        "tasks.digits.score: the label 9 lies outside of the 9 class names",
    ),
    "missing data": (
        lambda d: remove(d / "data" / "digits" / "tune"),
        "tasks.digits.tune: no file matches DIR/data/digits/tune/*.png",
    ),
    "one row to tune on": (
        lambda d: edit(d / "tasks.yaml", ("digits:\n", "digits:\n  limit: 1\n")),
        "tasks.digits.tune: tuning needs at least two rows, it has 1",
    ),
    "streaming data": (
        lambda d: edit(d / "tasks.yaml", ("digits/tune/*.png}", "digits/tune/*.png, streaming: true}")),
        "tasks.digits.tune: gives a IterableDataset, not one data set",
    ),
    "a base without its tokenizer": (
        lambda d: remove(d / "models" / "base" / "tokenizer.json"),
        "DIR/models/base: its library cannot load it: ",
    ),
    "a base without any tokenizer": (
        lambda d: [remove(p) for p in (d / "models" / "base").glob("tokenizer*")],
        "DIR/models/base: its library cannot load it: ",
    ),
    "a recipe that is a directory": (
        lambda d: (remove(d / "recipe.yaml"), (d / "recipe.yaml").mkdir()),
        "DIR/recipe.yaml: is a directory; name the recipe file in it",
    ),
    "a hub id": (
        lambda d: edit(d / "recipe.yaml", ("base_model: models/base", "base_model: openai/clip-vit-base-patch32")),
        "openai/clip-vit-base-patch32 is not in the hub's local cache, and the hub cannot be reached",
    ),
    "an unknown method": (
        lambda d: edit(d / "recipe.yaml", ("merge_method: task_arithmetic", "merge_method: model_stok")),
        "DIR/recipe.yaml:10: merge_method: unknown merge method 'model_stok'; did you mean 'model_stock'?",
    ),
    "a list of modules": (
        lambda d: edit(d / "recipe.yaml", ("visual.**.mlp", "'visual.transformer.resblocks'")),
        "belongs to an nn.MultiheadAttention",
    ),
    "an image that is none": (
        lambda d: [p.write_bytes(b"x") for p in (d / "data" / "digits" / "tune").iterdir()],
        "tasks.digits.tune: row 0 cannot be decoded",
    ),
    "missing column": (
        lambda d: edit(d / "tasks.yaml", ("digits:\n", "digits:\n  input: picture\n")),
        "tasks.digits.tune: has no column 'picture'; it has image",
    ),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_gives_one_message_and_leaves_nothing_behind(demo: Path, command: Command, kind: str) -> None:
    damage, message = BAD_INPUTS[kind]
    damage(demo)
    before = tree(demo.parent)
    status, out, err = command(demo / "recipe.yaml", "--out", demo / "deep" / "merged")
    err = err.replace(str(demo), "DIR")
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in out + err
    assert tree(demo.parent) == before
