"""From a plan to an output directory."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from wemoe_plugin.checkpoints.companions import copy_companions
from wemoe_plugin.checkpoints.header import FLOATS
from wemoe_plugin.checkpoints.manifest import doubt_output, package_versions, read_manifest, write_manifest
from wemoe_plugin.checkpoints.sources import AdaptedTensor
from wemoe_plugin.checkpoints.staging import clear_remains, staged_directory
from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.merging.card import model_card
from wemoe_plugin.merging.executor import Progress, execute_plan
from wemoe_plugin.merging.journal import Journal
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.survey import settle
from wemoe_plugin.modeling.config import CONFIG_NAME, LayerConfig, ModuleConfig, RouterConfig, WemoeConfig
from wemoe_plugin.recipe.loading import RecipeFile, load_recipe

if TYPE_CHECKING:
    from wemoe_plugin.modeling.router import Router


def merge(
    source: RecipeFile,
    plan: MergePlan,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    engine: str = "threads",
    jobs: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> MergePlan:
    """Carry out a plan; the output directory appears whole or not at all.

    Args:
        source: the recipe.
        plan: of the recipe.
        out: the output directory.
        force: replace an earlier output.
        resume: go on with what a run that was killed has left.
        engine: who does the work: ``threads`` of this process, or workers of ``ray``.
        jobs: threads or workers; default all processors.
        max_memory: bytes of all buffers together.
        device: where the arithmetic is done, a name of torch's.
        progress: told about input bytes as they are done, those that `settle` reads among them.

    Returns:
        What was carried out: the plan with all its ranks.

    Raises:
        WemoeError: see `wemoe_plugin.merging.executor.execute_plan` and
            `wemoe_plugin.checkpoints.staging.staged_directory`.
    """
    if plan.modules:
        _check_modules(plan)
    _spare_inputs(plan, out)
    made_from = _fingerprint(source, plan, device, max_memory)
    recipe = source.path.read_bytes()  # as it is now, whatever becomes of the file meanwhile
    tasks = None if source.tasks_path is None else source.tasks_path.read_bytes()
    plan = settle(source, plan, jobs=jobs, max_memory=max_memory, device=device, progress=progress)
    # Singular values decide about ranks, and so about the files: what a killed run left fits the same ranks only.
    begun_from = _fingerprint(source, plan, device, max_memory)
    with staged_directory(out, force, doubt_output, made_from=begun_from, resume=resume) as stage:
        work = stage.directory
        for left in work.iterdir():  # of the run that is resumed, only the weights are gone on with
            if left.name not in {file.name for file in plan.files}:
                left.unlink()
        copy_companions(plan.base.checkpoint.path, work, _common_dtype(plan))
        with Journal(stage.journal) as journal:
            execute_plan(
                plan,
                work,
                engine=engine,
                jobs=jobs,
                max_memory=max_memory,
                device=device,
                journal=journal,
                progress=progress,
            )
        if len(plan.static_files) > 1:
            _write_index(plan, work)
        if plan.modules:
            _write_upscaled(plan, work)
        (work / "recipe.yaml").write_bytes(recipe)
        if tasks is not None:
            (work / "tasks.yaml").write_bytes(tasks)
        (work / "README.md").write_text(model_card(plan, out.name, recipe.decode()), encoding="utf-8")
        places = {
            "recipe_directory": os.path.relpath(source.directory.resolve(), out.resolve()),
            "working_directory": os.path.relpath(source.fallback.resolve(), out.resolve()),
        }
        digest = hashlib.sha256(recipe).hexdigest()
        write_manifest(work, {**places, "recipe_sha256": digest, "made_from": made_from})
    return plan


def is_merged(source: RecipeFile, plan: MergePlan, out: Path, device: str, max_memory: int | None) -> bool:
    """Whether a directory is the whole output of this very merge; what a killed run left beside it is removed then.

    Raises:
        PlanError: another process is making it.
    """
    try:
        same = read_manifest(out).get("made_from") == _fingerprint(source, plan, device, max_memory)
    except CheckpointError:
        return False
    if same:
        clear_remains(out)
    return same


def _fingerprint(source: RecipeFile, plan: MergePlan, device: str, max_memory: int | None) -> str:
    """Changes with whatever the output's bytes depend on; LoRA changes round differently in ranges of other sizes."""
    text = source.path.read_bytes() + (b"" if source.tasks_path is None else source.tasks_path.read_bytes())
    adapted = any(isinstance(s, AdaptedTensor) for operation in plan.operations for s in operation.sources)
    limit = max_memory if adapted else None
    depends_on = (package_versions(), plan, device, limit, sorted(plan.stamps.items()))
    return hashlib.sha256(text + repr(depends_on).encode()).hexdigest()


def _spare_inputs(plan: MergePlan, out: Path) -> None:
    target = out.resolve()
    for file in plan.stamps:
        if target in file.resolve().parents:
            raise PlanError(f"{out}: holds {file.name}, an input of this merge; choose another --out")


def _write_upscaled(plan: MergePlan, directory: Path) -> None:
    from wemoe_plugin.modeling.attach import write_routers

    config = wemoe_config(plan)
    (directory / CONFIG_NAME).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_routers(directory, fresh_routers(config, plan.seed))


def _check_modules(plan: MergePlan) -> None:
    """Names and shapes cannot tell a Linear layer from all others: ask the model itself."""
    from wemoe_plugin.modeling.families import FAMILIES
    from wemoe_plugin.modeling.placement import place
    from wemoe_plugin.modeling.trial import what_routers_cannot_read

    model = FAMILIES[plan.library].skeleton(plan.base.checkpoint.path)
    if model is None:
        return
    config = wemoe_config(plan)
    placed, problems = place(model, config)
    if problems := problems or what_routers_cannot_read(model, placed, config.routers):
        more = f"\nand {len(problems) - 3} more" if len(problems) > 3 else ""
        cure = "\n(a rule before it, with a static method, can claim what cannot be upscaled: the first match wins)"
        raise PlanError("\n".join(problems[:3]) + more + cure)


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
                form=layer.form,
                ranks=layer.sizes if layer.form == "low_rank" else None,
                count=layer.sizes[0] if layer.form == "sparse" else None,
                bias=layer.path in biased,
            )
            for layer in weights
        )
        modules.append(
            ModuleConfig(
                path=module.path,
                router=module.router.name,
                lambdas=module.lambdas,
                layers=layers,
                argument=module.argument,
            )
        )
    planned = {module.router.name: module.router for module in plan.modules}
    routers = {
        name: RouterConfig(width=router.width, depth=router.depth, routing=router.routing)  # type: ignore[arg-type]
        for name, router in planned.items()
    }
    return WemoeConfig(
        library=plan.library,  # type: ignore[arg-type]
        experts=tuple(expert.name for expert in plan.experts),
        modules=tuple(modules),
        routers=routers,
        vector_files=tuple(file.name for file in plan.vector_files),
    )


def fresh_routers(config: WemoeConfig, seed: int) -> dict[str, Router]:
    """Routers that give λ for any input, by name."""
    import torch

    from wemoe_plugin.modeling.router import Router

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
    manifest = read_manifest(directory)
    places = [manifest.get(key) for key in ("recipe_directory", "working_directory")]
    if not all(isinstance(place, str) for place in places):
        raise CheckpointError(f"{directory}: its manifest does not say where the recipe stood")
    start, fallback = (Path(os.path.normpath(directory.resolve() / str(place))) for place in places)
    tasks = directory / "tasks.yaml"
    return load_recipe(directory / "recipe.yaml", start, fallback, tasks if tasks.is_file() else None)
