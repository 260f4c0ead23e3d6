"""Tune the routers of an output directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from wemoe_plugin.evaluation.scores import predict
from wemoe_plugin.modeling.config import read_config
from wemoe_plugin.modeling.loading import load_model
from wemoe_plugin.modeling.wemoe import freeze_all_but_routers
from wemoe_plugin.pipeline.routers import save_routers
from wemoe_plugin.pipeline.workbench import Workbench
from wemoe_plugin.recipe.schema import TuningSpec
from wemoe_plugin.tuning.loop import Check, TuningOutcome, TuningTask, tune


def tune_directory(
    directory: Path,
    workbench: Workbench,
    spec: TuningSpec | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    on_check: Callable[[Check], None] | None = None,
) -> TuningOutcome:
    """Tune on the recipe's unlabeled data, and rewrite ``routers.safetensors``; earlier results are removed.

    Args:
        directory: an output with upscaled modules.
        workbench: of its recipe.
        spec: how to tune; default what the recipe says.
        say: receives a line about what is being done.
        on_check: told about every look at the held-out data.

    Raises:
        TuningError: data or heads cannot be used, or the loss is not finite.
        CheckpointError: the directory or one of the recipe's models cannot be loaded.
    """
    read_config(directory)
    spec = spec or workbench.source.recipe.tuning or TuningSpec()
    tasks = [_task(name, workbench, spec, say) for name in workbench.tasks]
    model = load_model(directory, workbench.device)
    parameters = freeze_all_but_routers(model)
    say(f"tuning {sum(p.numel() for p in parameters):,} router parameters: {spec.objective}, {spec.steps} steps")
    outcome = tune(
        model,
        parameters,
        workbench.encode,
        tasks,
        objective=spec.objective,
        steps=spec.steps,
        learning_rate=spec.learning_rate,
        batch_size=spec.batch_size,
        hold_out=spec.hold_out,
        check_every=spec.check_every,
        seed=spec.seed,
        on_check=on_check,
    )
    save_routers(model, directory)
    return outcome


def _task(name: str, workbench: Workbench, spec: TuningSpec, say: Callable[[str], None]) -> TuningTask:
    images, head = workbench.tuning_images(name), workbench.head(name)
    teacher = None
    if spec.objective == "distill":
        expert = workbench.expert_name(name)
        say(f"asking the expert {expert} about {len(images):,} images")
        teacher = predict(workbench.expert(expert), workbench.encode, head, images.pixels, len(images))
    return TuningTask(name, len(images), images.pixels, head, teacher)
