"""Lay out the demo: the models, freshly drawn images, and a recipe that reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image

from wemoe_plugin.checkpoints.manifest import doubt_output
from wemoe_plugin.checkpoints.staging import staged_directory
from wemoe_plugin.demo.images import TASKS, DrawnTask, draw_images

TUNE_IMAGES, SCORE_IMAGES = 512, 1_000
"""Images per task, without labels to tune on and with labels to score on."""

RECIPE = """\
# Four fine-tunes of one CLIP become one model.
base_model: models/base
models:
  - model: models/digits
  - model: models/shapes
  - model: models/textures
  - model: models/clocks

# Whatever no rule claims is merged statically: base + lambda * (sum of the task vectors).
merge_method: task_arithmetic
parameters: {{lambda: 0.3}}

# The MLPs of the vision tower become weight-ensembling mixtures of experts.
rules:
  - match: visual.**.mlp
    merge_method: wemoe
    parameters:
      router: {{depth: 2}}
      task_vectors: {{form: dense}}

tasks: tasks.yaml

# Tune the routers without labels: follow each task's own expert.
tuning: {{objective: distill, steps: {steps}, learning_rate: {rate}, batch_size: 16, seed: {seed}}}
"""
_MARKER = ".wemoe-demo"  # lists what the demo wrote, so that --force deletes nothing else
STEPS, LEARNING_RATE = 300, 1e-2


def prepare_demo(
    directory: Path,
    *,
    seed: int = 0,
    force: bool = False,
    tune_images: int = TUNE_IMAGES,
    score_images: int = SCORE_IMAGES,
    steps: int = STEPS,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the demo's models, images, tasks and recipe.

    Args:
        directory: where; it appears whole or not at all.
        seed: of the images, the routers and the order of the data.
        force: replace an earlier demo.
        tune_images: per task, without labels.
        score_images: per task, with labels.
        steps: of tuning.
        say: told what is being done.

    Returns:
        The recipe's path.

    Raises:
        PlanError: the directory is in the way.
    """
    say(f"drawing {len(TASKS) * (tune_images + score_images):,} images of {', '.join(task.name for task in TASKS)}")
    with staged_directory(directory, force, _doubt) as stage:
        work = stage.directory
        with as_file(files("wemoe_plugin.demo") / "checkpoints") as checkpoints:
            for source in sorted(path for path in checkpoints.iterdir() if path.is_dir()):
                shutil.copytree(source, work / "models" / source.name)
        for task in TASKS:
            _write_images(work / "data" / task.name, task, seed, tune_images, score_images)
        (work / "tasks.yaml").write_text("\n".join(_task_yaml(task) for task in TASKS), encoding="utf-8")
        recipe = RECIPE.format(steps=steps, rate=LEARNING_RATE, seed=seed)
        (work / "recipe.yaml").write_text(recipe, encoding="utf-8")
        written = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
        (work / _MARKER).write_text("\n".join(written) + "\n", encoding="utf-8")
    return directory / "recipe.yaml"


def _doubt(directory: Path) -> str | None:
    """Why a folder is not, or not only, an earlier demo and its merge."""
    marker, merged = directory / _MARKER, directory / "merged"
    if not marker.is_file():
        return "this was not made by the demo"
    if merged.is_dir() and any(merged.iterdir()) and (reason := doubt_output(merged)):
        return f"in merged, {reason}"
    known = {_MARKER, *marker.read_text(encoding="utf-8").splitlines()}
    files = (path for path in directory.rglob("*") if path.is_file() and merged not in path.parents)
    found = {str(path.relative_to(directory)) for path in files}
    others = sorted(found - known)
    return f"this holds {others[0]} as well" if others else None


def _write_images(directory: Path, task: DrawnTask, seed: int, tune_images: int, score_images: int) -> None:
    """Image folders: ``tune`` flat, so that no label can be read from it; ``test`` with one folder per class."""
    images, _ = draw_images(task, tune_images, 2 * seed)
    (directory / "tune").mkdir(parents=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(directory / "tune" / f"{i:04d}.png")
    images, labels = draw_images(task, score_images, 2 * seed + 1)
    for label in range(len(task.class_names)):
        (directory / "test" / f"{label:02d}").mkdir(parents=True)
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(pixels).save(directory / "test" / f"{label:02d}" / f"{i:04d}.png")


def _task_yaml(task: DrawnTask) -> str:
    names = ", ".join(f'"{name}"' for name in task.class_names)
    templates = ", ".join(f'"{template}"' for template in task.templates)
    return f"""\
{task.name}:
  tune: {{path: imagefolder, data_files: data/{task.name}/tune/*.png}}
  score: {{path: imagefolder, data_files: data/{task.name}/test/*/*.png}}
  head:
    class_names: [{names}]
    templates: [{templates}]
"""
