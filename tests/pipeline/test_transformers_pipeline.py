"""The whole way on transformers: a CLIP base with its processor, vision-tower experts, image folders."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from models import transformers_family
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

from wemoe_plugin.errors import CheckpointError, TuningError
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.pipeline.evaluate import evaluate_directory
from wemoe_plugin.pipeline.merge import merge, recipe_of
from wemoe_plugin.pipeline.tune import tune_directory
from wemoe_plugin.pipeline.workbench import Workbench
from wemoe_plugin.recipe.loading import load_recipe
from wemoe_plugin.recipe.schema import TuningSpec

RECIPE = """\
base_model: base
models: [{model: e0}, {model: e1}]
merge_method: task_arithmetic
parameters: {lambda: 0.3}
rules: [{match: mlp, merge_method: wemoe}]
tasks:
  e0: &task
    tune: {path: imagefolder, data_files: images/*/*.png}
    score: {path: imagefolder, data_files: images/*/*.png}
    head: {templates: ["a {}."]}
  e1: *task
tuning: {objective: OBJECTIVE, steps: 6, learning_rate: 1e-2, batch_size: 4, hold_out: 4, check_every: 2}
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    transformers_family(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = files("wemoe_plugin.demo") / "checkpoints" / "base" / name
        (tmp_path / "base" / name).write_text(source.read_text())
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(tmp_path / "base")
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("objective", ["distill", "entropy"])
def test_the_whole_way(workspace: Path, objective: str) -> None:
    (workspace / "recipe.yaml").write_text(RECIPE.replace("OBJECTIVE", objective))
    source = load_recipe(workspace / "recipe.yaml")
    merge(source, plan_merge(source), workspace / "out")
    workbench = Workbench(recipe_of(workspace / "out"))
    workbench.check(tuning=True, scoring=True)
    spec = source.recipe.tuning
    assert isinstance(spec, TuningSpec)
    outcome = tune_directory(workspace / "out", workbench, spec)
    assert [check.step for check in outcome.checks] == [0, 2, 4, 6] or outcome.collapsed
    scores = evaluate_directory(workspace / "out", workbench)
    assert set(scores.tasks) == {"e0", "e1"}
    assert list(scores.routing["e0"]) == [f"vision_model.encoder.layers.{i}.mlp" for i in range(2)]


def test_features_and_heads_are_the_models_own(workspace: Path) -> None:
    (workspace / "recipe.yaml").write_text(RECIPE.replace("OBJECTIVE", "distill"))
    workbench = Workbench(load_recipe(workspace / "recipe.yaml"))
    pixels = workbench.tuning_images("e0").pixels([0, 5])
    texts = ["a ant.", "a bee."]
    tokens = workbench.family.tokenizer(workspace / "base")(texts)
    with torch.no_grad():
        expected = workbench.base(pixel_values=pixels, **tokens).logits_per_image
        logits = workbench.head("e0")(workbench.encode(workbench.base, pixels))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_base_without_a_text_tower_is_refused(workspace: Path) -> None:
    tower = CLIPModel.from_pretrained(workspace / "base").vision_model
    shutil.rmtree(workspace / "base")
    tower.save_pretrained(workspace / "base")
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(workspace / "base")
    (workspace / "recipe.yaml").write_text(RECIPE.replace("OBJECTIVE", "distill"))
    workbench = Workbench(load_recipe(workspace / "recipe.yaml"))
    with pytest.raises(CheckpointError, match=r"tasks need a text tower .* a CLIPVisionModel has none"):
        workbench.check(tuning=True, scoring=True)


def test_without_its_tokenizer_a_base_is_refused(workspace: Path) -> None:
    """transformers makes up a tokenizer that reads every text alike."""
    for path in (workspace / "base").glob("tokenizer*"):
        path.unlink()
    (workspace / "recipe.yaml").write_text(RECIPE.replace("OBJECTIVE", "distill"))
    workbench = Workbench(load_recipe(workspace / "recipe.yaml"))
    with pytest.raises((TuningError, CheckpointError), match="tokenizer"):
        workbench.check(tuning=True, scoring=True)


def test_an_expert_is_the_base_with_its_own_tower(workspace: Path) -> None:
    (workspace / "recipe.yaml").write_text(RECIPE.replace("OBJECTIVE", "distill"))
    base, towers = transformers_family(workspace / "again")
    workbench = Workbench(load_recipe(workspace / "recipe.yaml"))
    for k, tower in enumerate(towers):
        expert = workbench.expert(f"e{k}")
        for name, tensor in tower.state_dict().items():
            assert torch.equal(expert.vision_model.state_dict()[name], tensor)
        for name, tensor in base.text_model.state_dict().items():
            assert torch.equal(expert.text_model.state_dict()[name], tensor)
