"""The main job in its steps: merge a recipe, tune the routers, score the result.

Each step takes and leaves an output directory, so that any of them can be run again alone.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from wemoe_plugin.checkpoints.checkpoint import Checkpoint, open_checkpoint
from wemoe_plugin.checkpoints.companions import copy_companions
from wemoe_plugin.checkpoints.header import FLOATS
from wemoe_plugin.checkpoints.manifest import read_manifest, refresh_manifest, sha256_of, write_manifest
from wemoe_plugin.checkpoints.ranges import RangeReader
from wemoe_plugin.checkpoints.staging import staged_directory, write_atomically
from wemoe_plugin.errors import CheckpointError, TuningError
from wemoe_plugin.evaluation.report import render_report, render_routing
from wemoe_plugin.evaluation.routing import routing_means
from wemoe_plugin.evaluation.scores import Scores, accuracy, predict
from wemoe_plugin.merging.card import model_card
from wemoe_plugin.merging.executor import Progress, execute_plan
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.modeling.attach import routers_of, save_routers
from wemoe_plugin.modeling.config import (
    CONFIG_NAME,
    ROUTERS_NAME,
    LayerConfig,
    ModuleConfig,
    RouterConfig,
    WemoeConfig,
    read_config,
)
from wemoe_plugin.modeling.families import FAMILIES, ModelFamily
from wemoe_plugin.modeling.loading import load_model, load_static
from wemoe_plugin.modeling.router import Router
from wemoe_plugin.modeling.wemoe import freeze_all_but_routers
from wemoe_plugin.recipe.loading import RecipeFile, load_recipe
from wemoe_plugin.recipe.schema import TaskSpec, TuningSpec
from wemoe_plugin.tasks.head import ZeroShotHead, check_labels, choose_class_names, zero_shot_head
from wemoe_plugin.tasks.images import ImageSet, load_images
from wemoe_plugin.tuning.loop import Check, TuningOutcome, TuningTask, tune

Say = Callable[[str], None]
"""Receives one line about what is being done."""


def _silent(line: str) -> None:
    pass


def merge(
    source: RecipeFile,
    plan: MergePlan,
    out: Path,
    *,
    force: bool = False,
    jobs: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Carry out a plan; the output directory appears whole or not at all.

    Raises:
        WemoeError: see `wemoe_plugin.merging.executor.execute_plan` and
            `wemoe_plugin.checkpoints.staging.staged_directory`.
    """
    seed = source.recipe.tuning.seed if source.recipe.tuning else 0
    with staged_directory(out, force) as work:
        copy_companions(plan.base.checkpoint.path, work, _common_dtype(plan))
        execute_plan(plan, work, jobs=jobs, max_memory=max_memory, progress=progress)
        if len(plan.static_files) > 1:
            _write_index(plan, work)
        if plan.modules:
            config = wemoe_config(plan)
            (work / CONFIG_NAME).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
            save_routers(work, fresh_routers(config, seed))
        shutil.copyfile(source.path, work / "recipe.yaml")
        if source.tasks_path is not None:
            shutil.copyfile(source.tasks_path, work / "tasks.yaml")
        text = source.path.read_text(encoding="utf-8")
        (work / "README.md").write_text(model_card(plan, out.name, text), encoding="utf-8")
        origin = os.path.relpath(source.directory.resolve(), out.resolve())
        write_manifest(work, {"recipe_directory": origin, "recipe_sha256": sha256_of(source.path)})


def _common_dtype(plan: MergePlan) -> str | None:
    dtypes = {t.dtype for file in plan.static_files for t in file.tensors if t.dtype in FLOATS}
    return dtypes.pop() if len(dtypes) == 1 else None


def _write_index(plan: MergePlan, directory: Path) -> None:
    weight_map = {tensor.name: file.name for file in plan.static_files for tensor in file.tensors}
    total = sum(file.nbytes for file in plan.static_files)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def wemoe_config(plan: MergePlan) -> WemoeConfig:
    """What ``wemoe_config.json`` says of a plan."""
    modules = []
    for module in plan.modules:
        weights = [layer for layer in module.layers if layer.tensor.endswith("weight")]
        biased = {layer.path for layer in module.layers if not layer.tensor.endswith("weight")}
        layers = tuple(
            LayerConfig(
                path=layer.path,
                form="dense" if layer.rank is None else "low_rank",
                rank=layer.rank,
                bias=layer.path in biased,
            )
            for layer in weights
        )
        modules.append(ModuleConfig(path=module.path, router=module.router.name, lambdas=module.lambdas, layers=layers))
    routers = {m.router.name: RouterConfig(width=m.router.width, depth=m.router.depth) for m in plan.modules}  # type: ignore[arg-type]
    return WemoeConfig(
        library=plan.library,  # type: ignore[arg-type]
        experts=tuple(expert.name for expert in plan.experts),
        modules=tuple(modules),
        routers=routers,
        vector_files=tuple(file.name for file in plan.vector_files),
    )


def fresh_routers(config: WemoeConfig, seed: int) -> dict[str, Router]:
    """Routers that give λ for any input, by name."""
    generator = torch.Generator().manual_seed(seed)
    lambdas = {module.router: module.lambdas for module in config.modules}
    return {
        name: Router(spec.width, len(config.experts), spec.depth, lambdas[name], generator)
        for name, spec in config.routers.items()
    }


def recipe_of(directory: Path) -> RecipeFile:
    """The recipe an output directory was made from, its paths starting where the recipe stood then.

    Raises:
        CheckpointError: the directory is not an output.
    """
    origin = read_manifest(directory).get("recipe_directory")
    if not isinstance(origin, str):
        raise CheckpointError(f"{directory}: its manifest does not say where the recipe stood")
    tasks = directory / "tasks.yaml"
    start = Path(os.path.normpath(directory.resolve() / origin))
    return load_recipe(directory / "recipe.yaml", start, tasks if tasks.is_file() else None)


@dataclass(frozen=True)
class _Bench:
    """What tuning and scoring share: the recipe's models and the base's way of reading."""

    source: RecipeFile
    directory: Path
    base: Path
    family: ModelFamily
    device: str

    @property
    def experts(self) -> Mapping[str, Path]:
        return {entry.name: self.source.resolve(entry.model) for entry in self.source.recipe.models}

    def encode(self, model: nn.Module, pixels: Tensor) -> Tensor:
        return self.family.encode_image(model, pixels.to(self.device))

    def images(self, name: str, task: TaskSpec, purpose: str, transform: Callable[..., Tensor]) -> ImageSet:
        arguments = task.tune if purpose == "tune" else task.score
        where = f"tasks.{name}.{purpose}"
        if arguments is None:
            raise TuningError(f"{where}: is missing; it holds the arguments of datasets.load_dataset")
        label = task.label if purpose == "score" else None
        return load_images(
            arguments,
            self.source.resolve,
            transform,
            input_column=task.input,
            label_column=label,
            limit=task.limit,
            where=where,
        )

    def expert(self, base: nn.Module, name: str) -> nn.Module:
        """The base model with an expert's tensors."""
        return with_weights(base, open_checkpoint(self.experts[name]))


def _bench(directory: Path, device: str) -> _Bench:
    source = recipe_of(directory)
    if not source.recipe.tasks:
        raise TuningError(f"{directory}: its recipe has no tasks; add tasks: to the recipe and merge again")
    reference = source.recipe.base_model or source.recipe.models[0].model
    base = source.resolve(reference)
    if not base.exists():
        raise CheckpointError(f"{base}: the base of {directory} is no longer there")
    library = open_checkpoint(base).library
    return _Bench(source, directory, base, FAMILIES[library or "transformers"], device)


def with_weights(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """A copy of a model with a checkpoint's tensors; what the checkpoint lacks stays.

    A directory with its own configuration is loaded by its own library where its tensors are a whole model; only
    partial ones (a vision tower beside a CLIP base) are laid over the base.
    """
    import copy

    result = copy.deepcopy(model)
    state = result.state_dict()
    unknown = [name for name in checkpoint.tensors if name not in state]
    if unknown:
        raise CheckpointError(f"{checkpoint.path}: the base model has no {unknown[0]!r}")
    with RangeReader(tensor.file for tensor in checkpoint.tensors.values()) as reader, torch.no_grad():
        for name, tensor in checkpoint.tensors.items():
            state[name].copy_(reader.read(tensor, 0, tensor.elements).view(tensor.shape))
    return result


def _text_heads(bench: _Bench, base: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, ZeroShotHead]:
    tokenize = bench.family.tokenizer(bench.base)

    def encode(texts):  # type: ignore[no-untyped-def]
        tokens = tokenize(texts)
        return bench.family.encode_text(base, tokens.to(bench.device))

    scale = float(bench.family.logit_scale(base).detach())
    heads = {}
    for name, class_names in names.items():
        templates = (bench.source.recipe.tasks or {})[name].head.templates
        heads[name] = zero_shot_head(encode, class_names, templates, scale)
    return heads


def tune_directory(
    directory: Path,
    *,
    spec: TuningSpec | None = None,
    device: str = "cpu",
    say: Say = _silent,
    on_check: Callable[[Check], None] | None = None,
) -> TuningOutcome:
    """Tune the routers of an output directory on its recipe's unlabeled data, and rewrite ``routers.safetensors``.

    Args:
        directory: an output with upscaled modules.
        spec: how; default what the recipe says.
        device: where the model runs.
        say: told what is being done.
        on_check: told about every look at the held-out data.

    Raises:
        TuningError: there is nothing to tune or to tune on; data or heads cannot be used.
        CheckpointError: the directory or one of the recipe's models cannot be loaded.
    """
    config = read_config(directory)
    bench = _bench(directory, device)
    spec = spec or bench.source.recipe.tuning or TuningSpec()
    specs = bench.source.recipe.tasks or {}
    transform = bench.family.image_transform(bench.base)
    say(f"reading the unlabeled data of {len(specs)} tasks")
    sets = {name: bench.images(name, task, "tune", transform) for name, task in specs.items()}
    base = load_static(bench.base, device)
    names = {}
    for name, task in specs.items():
        stored = sets[name].label_names
        if task.head.class_names is None and task.score is not None:
            stored = bench.images(name, task, "score", transform).label_names
        names[name] = choose_class_names(task.head.class_names, stored, f"tasks.{name}")
    heads = _text_heads(bench, base, names)
    tasks = []
    for name, task in specs.items():
        teacher = None
        if spec.objective == "distill":
            expert = task.expert or name
            say(f"asking the expert {expert} about {len(sets[name]):,} images")
            model = bench.expert(base, expert)
            teacher = predict(model, bench.encode, heads[name], sets[name].pixels, len(sets[name]))
        tasks.append(TuningTask(name, len(sets[name]), sets[name].pixels, heads[name], teacher))
    del base
    model = load_model(directory, device)
    parameters = freeze_all_but_routers(model)
    say(f"tuning {sum(p.numel() for p in parameters):,} router parameters, {spec.objective}, {spec.steps} steps")
    outcome = tune(
        model,
        parameters,
        bench.encode,
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
    save_routers(directory, routers_of(model, config))
    refresh_manifest(directory, [ROUTERS_NAME])
    return outcome


def evaluate_directory(
    directory: Path, *, device: str = "cpu", say: Say = _silent, seconds: Mapping[str, float] | None = None
) -> Scores:
    """Score base, experts, static merge and merged model on the recipe's labeled data.

    Writes ``results.json``, ``report.html`` and, with upscaled modules, ``routing.svg`` into the directory.

    Args:
        directory: an output whose recipe has tasks.
        device: where the models run.
        say: told what is being done.
        seconds: what earlier steps took, to stand beside the scores.

    Raises:
        TuningError: there are no tasks; data, heads or labels cannot be used.
        CheckpointError: the directory or one of the recipe's models cannot be loaded.
    """
    started = time.perf_counter()
    bench = _bench(directory, device)
    specs = bench.source.recipe.tasks or {}
    transform = bench.family.image_transform(bench.base)
    say(f"reading the labeled data of {len(specs)} tasks")
    sets = {name: bench.images(name, task, "score", transform) for name, task in specs.items()}
    names = {}
    labels = {}
    for name, task in specs.items():
        names[name] = choose_class_names(task.head.class_names, sets[name].label_names, f"tasks.{name}")
        labels[name] = sets[name].labels()
        check_labels(labels[name], names[name], f"tasks.{name}.score")
    base = load_static(bench.base, device)
    heads = _text_heads(bench, base, names)
    static, merged = load_static(directory, device), load_model(directory, device)
    routers = routers_of(merged, read_config(directory)) if (directory / CONFIG_NAME).is_file() else {}
    rows: dict[str, dict[str, float]] = {}
    routing: dict[str, dict[str, list[float]]] = {}
    for name, task in specs.items():
        say(f"scoring {name}: {len(sets[name]):,} images")
        models = {"base": base, "expert": bench.expert(base, task.expert or name), "static": static, "merged": merged}
        rows[name] = {}
        for column, model in models.items():
            with routing_means(routers if column == "merged" else {}) as means:
                logits = predict(model, bench.encode, heads[name], sets[name].pixels, len(sets[name]))
            rows[name][column] = accuracy(logits, labels[name])
            if column == "merged" and routers:
                routing[name] = means
    experts = read_config(directory).experts if routers else ()
    spent = {**(seconds or {}), "evaluate": time.perf_counter() - started}
    scores = Scores(rows, {key: round(value, 2) for key, value in spent.items()}, routing, experts)
    write_results(directory, scores)
    return scores


def write_results(directory: Path, scores: Scores) -> None:
    """Write the files that show the scores, and enter them in the manifest."""
    files = {
        "results.json": json.dumps(scores.to_json(), indent=2) + "\n",
        "report.html": render_report(scores, directory.resolve().name),
    }
    if scores.routing:
        files["routing.svg"] = render_routing(scores)
    for name, text in files.items():
        write_atomically(directory / name, text.encode())
    refresh_manifest(directory, files)


def read_results(directory: Path) -> Scores:
    """The scores that `evaluate_directory` left.

    Raises:
        CheckpointError: there are none.
    """
    path = directory / "results.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Scores(data["tasks"], data["seconds"], data["routing"], data["experts"])
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: has no results.json; run wemoe-merge evaluate {directory}") from None
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be used: {error}") from None


def reseeded(spec: TuningSpec, seed: int | None) -> TuningSpec:
    """The same tuning with another seed."""
    return spec if seed is None else spec.model_copy(update={"seed": seed})


__all__ = ["Scores", "evaluate_directory", "merge", "read_results", "recipe_of", "replace", "tune_directory"]
