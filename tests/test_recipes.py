"""Every recipe to copy does what it says, on small models of the classes it is for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from architectures import ROWS, save
from models import fine_tuned
from torch import nn

from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.modeling.loading import load_model
from wemoe_plugin.modeling.wemoe import wemoe_modules
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.pipeline.verify import verify
from wemoe_plugin.recipe.loading import load_recipe

RECIPES = Path(__file__).parents[1] / "merge_recipes"
FOR = {
    "clip/vision-towers.yaml": ["CLIP vision tower"],
    "open_clip/low-rank-mlps.yaml": ["open_clip"],
    "open_clip/shared-router.yaml": ["open_clip"],
    "open_clip/timm-tower.yaml": ["open_clip with a timm tower"],
    "vit/image-classifiers.yaml": ["ViT", "DINOv2"],
    "t5/flan-t5.yaml": ["T5", "Flan-T5"],
    "llama/low-rank-mlps.yaml": ["Llama", "Mistral", "Qwen2", "Qwen3"],
    "llama/lora-experts.yaml": ["Llama", "Mistral", "Qwen2", "Qwen3"],
    "llama/sparse-mlps.yaml": ["Llama", "Mistral", "Qwen2", "Qwen3"],
    "bert/classifiers.yaml": ["BERT", "RoBERTa"],
    "gpt2/low-rank-mlps.yaml": ["GPT-2"],
}
ON_THE_HUB = {"clip/vit-b-32-eight-tasks.yaml", "clip/task-arithmetic.yaml"}
STATIC = {"llama/a-method-for-each-part.yaml"}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it


def test_every_recipe_is_tried() -> None:
    there = {path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml")}
    assert there == {*FOR, *ON_THE_HUB, *STATIC}


def make_models(directory: Path, row: str, references: list[str]) -> None:
    """A base, and an expert or adapter under each path that the recipe names."""
    torch.manual_seed(0)
    base = ROWS[row].build().eval()
    save(base, directory / "base")
    for seed, reference in enumerate(references):
        _, _, adapter = reference.partition("+")
        target = directory / (adapter or reference)
        target.parent.mkdir(exist_ok=True)
        if adapter:
            save_adapter(fine_tuned(base, 0, 0.0), target, seed)
        else:
            save(fine_tuned(base, seed), target)


def save_adapter(base: nn.Module, target: Path, seed: int) -> None:
    config = peft.LoraConfig(r=2 + seed, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(target)  # type: ignore[arg-type]


@pytest.mark.parametrize(("recipe", "row"), [(recipe, row) for recipe, rows in FOR.items() for row in rows])
def test_a_recipe_makes_a_mixture(tmp_path: Path, recipe: str, row: str) -> None:
    shutil.copyfile(RECIPES / recipe, tmp_path / "recipe.yaml")
    content: dict[str, Any] = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    make_models(tmp_path, row, [entry["model"] for entry in content["models"]])
    source = load_recipe(tmp_path / "recipe.yaml")
    merge(source, plan_merge(source), tmp_path / "out")
    assert list(wemoe_modules(load_model(tmp_path / "out")))
    assert all(check.kept for check in verify(tmp_path / "out"))
