"""The models of a recipe, opened and found to be fine-tunes of one base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wemoe_plugin.checkpoints.checkpoint import Checkpoint
from wemoe_plugin.checkpoints.companions import find_companions
from wemoe_plugin.checkpoints.header import FLOATS
from wemoe_plugin.checkpoints.reference import open_reference
from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.merging.alignment import align
from wemoe_plugin.merging.tied import Twins, tie
from wemoe_plugin.recipe.loading import RecipeFile


@dataclass(frozen=True)
class Model:
    """A model of the recipe: its name there and its checkpoint."""

    name: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Inputs:
    """What a recipe merges.

    Attributes:
        base: θ₀; without a base_model, the first model.
        models: those the recipe lists, under the base's names.
        twins: tensors that must be equal to each other.
        notes: about tied weights.
    """

    base: Model
    models: tuple[Model, ...]
    twins: tuple[Twins, ...]
    notes: tuple[str, ...]


def open_models(source: RecipeFile) -> Inputs:
    """The base and the models to merge, under the base's names.

    Raises:
        CheckpointError: some cannot be read; all of them are named. Or a file beside the base's weights is a link out
            of its directory.
        PlanError: some are not fine-tunes of the base; everything that does not fit is named.
    """
    recipe = source.recipe
    problems: list[str] = []

    def opened(reference: str, name: str, *location: str | int) -> Model | None:
        try:
            return Model(name, open_reference(reference, source.resolve))
        except CheckpointError as error:
            problems.append(f"{source.where(*location)}: {error}")
            return None

    base = opened(recipe.base_model, "base", "base_model") if recipe.base_model is not None else None
    experts = [opened(entry.model, entry.name, "models", i, "model") for i, entry in enumerate(recipe.models)]
    if problems:
        raise CheckpointError("\n".join(problems))
    models = tuple(expert for expert in experts if expert is not None)
    for model in (*models, *([base] if base is not None else [])):
        if not model.checkpoint.tensors:
            raise CheckpointError(f"{model.checkpoint.path}: holds no tensors")
    if base is None:
        base = models[0]
    if base.checkpoint.library is None:
        raise CheckpointError(f"{base.checkpoint.path}: the base must be a directory with its configuration")
    if base.checkpoint.adapter is not None:
        raise CheckpointError(f"{base.checkpoint.path}: the base must be a whole model; adapters belong to experts")
    find_companions(base.checkpoint.path)
    aligned: list[Model] = []
    twins: list[Twins] = []
    notes: list[str] = []
    for model in models:
        checkpoint, tied, about = tie(align(model.checkpoint, base.checkpoint), base.checkpoint)
        aligned.append(Model(model.name, checkpoint))
        twins += tied
        notes += [f"{model.name}: {line}" for line in about]
    misfits = list(_misfits(base, aligned))
    if misfits:
        raise PlanError("\n".join(misfits))
    return Inputs(base, tuple(aligned), tuple(twins), tuple(notes))


def _misfits(base: Model, experts: Sequence[Model]) -> Iterable[str]:
    """Models that are not fine-tunes of one base."""
    reference = base.checkpoint.tensors
    held = {name for expert in experts for name in expert.checkpoint.tensors}
    for expert in experts:
        tensors, where = expert.checkpoint.tensors, f"{expert.checkpoint.path} ({expert.name})"
        extra = [name for name in tensors if name not in reference]
        if extra and len(extra) == len(tensors):
            yield f"{where}: none of its tensors is in the base {base.checkpoint.path}; is it a fine-tune of it?"
            continue
        if extra:
            yield f"{where}: has {_some(extra)}, which the base {base.checkpoint.path} has not"
        missing = [name for name in reference if name in held and name not in tensors]
        if missing:
            yield f"{where}: lacks {_some(missing)}, which the base and other experts have"
        for name in (name for name in tensors if name in reference):
            if tensors[name].shape != reference[name].shape:
                shapes = f"{list(tensors[name].shape)}, the base {list(reference[name].shape)}"
                yield f"{where}: {name!r} has shape {shapes}{_grown(tensors[name].shape, reference[name].shape, name)}"
            elif (tensors[name].dtype in FLOATS) != (reference[name].dtype in FLOATS):
                yield f"{where}: {name!r} is {tensors[name].dtype}, in the base {reference[name].dtype}"
        yield from (f"{where}: {problem}" for problem in _other_activation(expert.checkpoint, base.checkpoint))


def _grown(shape: tuple[int, ...], base: tuple[int, ...], name: str) -> str:
    """What to do about a vocabulary with more entries than the base's."""
    embedding = any(word in name for word in ("embed", "wte", "lm_head", "shared"))
    if not embedding or len(shape) != 2 or shape[1:] != base[1:]:
        return ""
    return "; with tokenizer_source: union (or base) mergekit aligns vocabularies that differ"


_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "dense_act_fn")
_CLIP_DEFAULT = {"clip": "quick_gelu", "clip_vision_model": "quick_gelu", "clip_text_model": "quick_gelu"}


def _other_activation(expert: Checkpoint, base: Checkpoint) -> Iterable[str]:
    """Weights that were trained under one activation are wrong under another, and no shape shows it."""
    if expert.library is None or expert.library != base.library:
        return
    mine, theirs = _activations(expert), _activations(base)
    if "" in mine and "" not in theirs:  # a tower alone, beside a model that has it under vision_config
        mine = {"vision_config": mine[""]}
    for part in mine.keys() & theirs.keys():
        if mine[part] != theirs[part]:
            of = f" of {part}" if part else ""
            yield f"its activation{of} is {mine[part]}, the base's {theirs[part]}; merged weights would fit neither"


def _activations(checkpoint: Checkpoint) -> dict[str, str]:
    """Activations by the part of the configuration that names them; the empty part is the top."""
    if checkpoint.library == "open_clip":
        settings = checkpoint.config.get("model_cfg", {})
        return {"": "QuickGELU" if isinstance(settings, dict) and settings.get("quick_gelu") else "GELU"}
    found = {}
    for part in ("", "vision_config", "text_config"):
        settings = checkpoint.config if not part else checkpoint.config.get(part)
        if not isinstance(settings, dict):
            continue
        named = next((settings[key] for key in _ACTIVATION_KEYS if key in settings), None)
        named = named or _CLIP_DEFAULT.get(str(settings.get("model_type")))
        if named is not None and not (part == "" and "vision_config" in checkpoint.config):
            found[part] = str(named)
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
