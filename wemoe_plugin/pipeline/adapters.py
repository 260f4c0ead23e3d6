"""Each expert's low-rank task vectors as a PEFT adapter for the base."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from wemoe_plugin.checkpoints.checkpoint import open_checkpoint
from wemoe_plugin.checkpoints.conv1d import is_conv1d
from wemoe_plugin.checkpoints.manifest import MANIFEST_NAME, doubt_output, write_manifest
from wemoe_plugin.checkpoints.module_names import live_names
from wemoe_plugin.checkpoints.ranges import RangeReader
from wemoe_plugin.checkpoints.staging import staged_directory
from wemoe_plugin.checkpoints.tensors import TORCH_DTYPE, read_as
from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.modeling.config import read_config
from wemoe_plugin.modeling.families import FAMILIES
from wemoe_plugin.modeling.stored import StoredVectors, stored_vectors
from wemoe_plugin.pipeline.merge import recipe_of


def export_adapters(directory: Path, out: Path, *, force: bool = False) -> dict[str, int]:
    """Write one adapter directory per expert; PEFT loads it on the recipe's base.

    Base and adapter together are the base with the expert's compressed task vectors: what the recipe merges statically
    is not in it. Ranks go into PEFT's patterns, with alphas that make its scaling one; biases that moved are LoRA
    biases.

    Args:
        directory: an output of wemoe-merge with low-rank task vectors.
        out: the new directory, with a directory for each expert.
        force: replace an earlier output.

    Returns:
        By the expert's name, how many layers its adapter has; experts that moved nothing have none.

    Raises:
        CheckpointError: the directory is not an output, or is damaged.
        PlanError: no task vectors of it are low-rank, or the output is in the way.
    """
    config = read_config(directory)
    checkpoint = open_checkpoint(directory)
    if directory.resolve() in (out.resolve(), *out.resolve().parents):
        raise PlanError(f"{out}: lies in the directory that is exported; choose another one")
    vectors = stored_vectors(directory, config)
    weights = {name: own for name, own in vectors.items() if own.form == "low_rank"}
    if not weights:
        raise PlanError(f"{directory}: has no low-rank task vectors; only those are LoRA adapters")
    model = FAMILIES[config.library].skeleton(checkpoint.path)
    if model is None:
        raise CheckpointError(f"{directory}: its configuration names no class, so modules have no names for PEFT")
    live = live_names(model, weights)
    missing = next((name for name in weights if name not in live), None)
    if missing is not None:
        raise CheckpointError(f"{directory}: its {type(model).__name__} has no {missing!r}")
    layers = {name: live[name].removesuffix(".weight") for name in weights}
    base = recipe_of(directory).recipe.base_model
    made: dict[str, int] = {}
    files = dict.fromkeys(part.file for own in vectors.values() for part in own.parts)
    with staged_directory(out, force, doubt_output) as stage, RangeReader(files) as reader:
        for k, expert in enumerate(config.experts):
            ranks = {name: own.ranks[k] for name, own in weights.items() if own.ranks[k]}
            made[expert] = len(ranks)
            if not ranks:
                continue
            state: dict[str, Tensor] = {}
            biased = any(f"{name.removesuffix('weight')}bias" in vectors for name in ranks)
            for name in ranks:
                path = layers[name]
                swapped = is_conv1d(model.get_submodule(path))
                bias = vectors.get(f"{name.removesuffix('weight')}bias")
                has_bias = biased and model.get_submodule(path).bias is not None
                for end, tensor in _factors(reader, weights[name], bias, k, swapped, has_bias).items():
                    state[f"base_model.model.{path}.{end}"] = tensor
            target = stage.directory / expert
            if expert == MANIFEST_NAME:
                raise PlanError(f"the expert {expert} has the name of a file of the output; name it otherwise")
            target.mkdir()
            (target / "adapter_model.safetensors").write_bytes(save(state, {"format": "pt"}))
            _save_config(target, {layers[name]: rank for name, rank in ranks.items()}, biased, base, model)
        write_manifest(stage.directory, {"exported_from": directory.name, "adapters": made})
    return made


def _factors(
    reader: RangeReader, weight: StoredVectors, bias: StoredVectors | None, k: int, swapped: bool, biased: bool
) -> dict[str, Tensor]:
    """Expert k's factors of one layer under PEFT's names and in its orientation."""
    down, up = weight.factors(reader, k)
    if swapped:  # the weight is stored as (in, out)
        down, up = up, down
    dtype = TORCH_DTYPE[weight.parts[0].dtype]
    found = {"lora_A.weight": down.to(dtype), "lora_B.weight": up.T.contiguous().to(dtype)}
    if biased:
        shift = up.new_zeros(up.shape[1])
        if bias is not None:
            (part,) = bias.parts
            shift = read_as(reader, part, k * len(shift), len(shift), shift.dtype)
        found["lora_B.bias"] = shift.to(dtype)
    return found


def _save_config(target: Path, ranks: Mapping[str, int], biased: bool, base: str | None, model: nn.Module) -> None:
    from peft import LoraConfig

    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Anchored: PEFT takes a key without ^ for the end of a name, and one tower's names may be ends of another's.
    others = {f"^{re.escape(path)}$": rank for path, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        target_modules=_targets(ranks, model),
        lora_dropout=0.0,
        lora_bias=biased,
        fan_in_fan_out=any(is_conv1d(model.get_submodule(path)) for path in ranks),
        base_model_name_or_path=base,
        inference_mode=True,
        task_type=_task_type(model),
    )
    config.save_pretrained(str(target))
    path = target / "adapter_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(written["target_modules"], list):
        written["target_modules"].sort()  # PEFT keeps a set, whose order is another in every process
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _task_type(model: nn.Module) -> str | None:
    """PEFT's name of what a language model is for; classifiers' heads would have to be in the adapter."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if "input_ids" not in inspect.signature(model.forward).parameters:  # PEFT's wrappers of a task pass them on
        return None
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    both = getattr(config, "is_encoder_decoder", False) and name.endswith("ForConditionalGeneration")
    return "SEQ_2_SEQ_LM" if both else None


def _targets(paths: Collection[str], model: nn.Module) -> list[str] | str:
    """The layers by their names, or by an expression where these are ends of other layers' names too."""
    ends = tuple(f".{path}" for path in paths)
    if not any(name.endswith(ends) and name not in paths for name, _ in model.named_modules()):
        return sorted(paths)
    return "^(" + "|".join(re.escape(path) for path in sorted(paths)) + ")$"
