"""`inspect` counts what is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from models import open_clip_family
from safetensors.torch import load_file

from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe

Command = Callable[..., tuple[int, str, str]]
RECIPE = """\
base_model: base
models: [{model: e0}, {model: e1, parameters: {weight: 0.5}}]
merge_method: task_arithmetic
parameters: {lambda: 0.4}
rules:
  - match: visual.**.mlp
    merge_method: wemoe
    parameters: {router: {depth: 1, shared: true}, task_vectors: {form: low_rank, rank: 3}}
  - {match: transformer.**.mlp, merge_method: wemoe}
"""


def merged(directory: Path, text: str) -> Path:
    open_clip_family(directory)
    (directory / "recipe.yaml").write_text(text)
    source = load_recipe(directory / "recipe.yaml")
    merge(source, plan_merge(source), directory / "out")
    return directory / "out"


def test_parameters_and_bytes_are_those_of_the_files(tmp_path: Path, command: Command) -> None:
    out = merged(tmp_path, RECIPE)
    status, said, _ = command("inspect", out, "--json")
    assert status == 0
    found = json.loads(said)
    vectors = load_file(out / "wemoe.safetensors")
    kept = {name: t for name, t in vectors.items() if not name.endswith(".norms")}
    assert sum(module["vector_parameters"] for module in found["modules"]) == sum(t.numel() for t in kept.values())
    assert sum(module["vector_bytes"] for module in found["modules"]) == sum(t.nbytes for t in vectors.values())
    assert found["router_parameters"] == sum(t.numel() for t in load_file(out / "routers.safetensors").values())
    assert found["parameters"] == sum(t.numel() for t in load_file(out / "open_clip_model.safetensors").values())
    first = found["modules"][0]
    assert (first["path"], first["form"]) == ("visual.transformer.resblocks.0.mlp", "low_rank 3")
    assert first["lambdas"] == pytest.approx([0.4, 0.2])
    assert first["router"] == "depth 1, width 32, rules.0"


def test_the_table_has_a_line_for_every_module(tmp_path: Path, command: Command) -> None:
    out = merged(tmp_path, RECIPE)
    status, said, _ = command("inspect", out)
    assert status == 0
    assert [line.split()[0] for line in said.splitlines() if ".mlp " in line] == [
        *(f"visual.transformer.resblocks.{i}.mlp" for i in range(2)),
        *(f"transformer.resblocks.{i}.mlp" for i in range(2)),
    ]
    assert "4 modules: " in said


def test_a_static_merge_says_so(tmp_path: Path, command: Command) -> None:
    out = merged(tmp_path, RECIPE[: RECIPE.index("rules")])
    status, said, _ = command("inspect", out)
    assert status == 0
    assert "a static merge: no module is upscaled" in said
    (out / "open_clip_config.json").unlink()
    assert command("inspect", out)[0] == 2
