"""Recipes that mergekit carries out as a whole, into an output directory like any other."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from wemoe_plugin.checkpoints.manifest import doubt_output, sha256_of, write_manifest
from wemoe_plugin.checkpoints.reference import open_reference
from wemoe_plugin.checkpoints.staging import staged_directory
from wemoe_plugin.recipe.whole import WholeRecipe


def merge_whole(
    recipe: WholeRecipe,
    out: Path,
    *,
    force: bool = False,
    device: str = "cpu",
    shard_bytes: int = 5_000_000_000,
    seed: int = 0,
) -> None:
    """Let mergekit carry out a recipe; the output directory appears whole or not at all.

    Args:
        recipe: what to do.
        out: the output directory.
        force: replace an earlier output.
        device: where the arithmetic is done, a name of torch's.
        shard_bytes: the largest weights file to write.
        seed: of the methods that draw numbers.

    Raises:
        RecipeError: mergekit does not accept the recipe.
        PlanError: mergekit cannot carry it out, or the output is in the way.
    """
    from wemoe_plugin.merging.mergekit_bridge import run_recipe

    with staged_directory(out, force, doubt_output) as stage, tempfile.TemporaryDirectory() as adapters:
        run_recipe(
            recipe,
            stage.directory,
            {
                "device": device,
                "out_shard_size": shard_bytes,
                "random_seed": seed,
                "quiet": True,
                "lora_merge_cache": adapters,
            },
        )
        shutil.copyfile(recipe.path, stage.directory / "recipe.yaml")
        write_manifest(stage.directory, {"recipe_sha256": sha256_of(recipe.path)})


def whole_lines(recipe: WholeRecipe, format_size: Callable[[int], str]) -> list[str]:
    """What is known of such a recipe from its models' headers.

    Raises:
        CheckpointError: a model is not there, or is damaged.
    """
    lines = [f"carried out by mergekit as a whole, for its {', '.join(recipe.keys)}", ""]
    for reference in recipe.models:
        tensors = open_reference(reference, Path).tensors.values()
        size = format_size(sum(tensor.nbytes for tensor in tensors))
        lines.append(f"{reference}  {len(tensors)} tensors, {sum(t.elements for t in tensors):,} parameters, {size}")
    return lines
