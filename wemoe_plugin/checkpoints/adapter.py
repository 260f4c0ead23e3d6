"""PEFT LoRA adapters laid over a base, by names and headers alone: no merged copy exists on disk or in memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wemoe_plugin.checkpoints.checkpoint import Checkpoint
from wemoe_plugin.checkpoints.containment import file_in
from wemoe_plugin.checkpoints.conv1d import stores_transposed
from wemoe_plugin.checkpoints.header import StoredTensor, read_header
from wemoe_plugin.checkpoints.sources import AdaptedTensor, ShiftedTensor, Source
from wemoe_plugin.errors import CheckpointError

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_UNDERSTOOD = (
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha"),
    *("lora_bias", "lora_dropout", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision"),
    *("runtime_config", "target_modules", "task_type", "use_rslora"),
)
"""Fields of PEFT's configuration that change nothing about s·B·A, or that are followed here."""

_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")

_FACTORS = {
    "lora_A.weight": ("A", "weight"),
    "lora_B.weight": ("B", "weight"),
    "lora_embedding_A": ("A", "weight"),
    "lora_embedding_B": ("B", "weight"),
    "lora_B.bias": ("bias", "bias"),
}


def apply_adapter(base: Checkpoint, adapter: Path) -> Checkpoint:
    """The base with an adapter's changes.

    Rank and alpha patterns, rsLoRA, ``fan_in_fan_out``, ``modules_to_save``, tuned biases, embeddings, Conv1D and
    convolutions are read as PEFT reads them.

    Raises:
        CheckpointError: it is no LoRA adapter, is of a kind whose change is not s·B·A, does not fit the base, or has
            a tensor that nothing uses.
    """
    config = _read_config(adapter)
    weights = file_in(adapter, _WEIGHTS)
    if weights is None:
        raise CheckpointError(f"{adapter}: {_WEIGHTS} is absent")
    tensors: dict[str, Source] = dict(base.tensors)
    in_file = _file_names(base, adapter, read_header(weights))
    changes: dict[str, dict[str, StoredTensor]] = {}
    modules: dict[str, str] = {}
    for key, tensor in read_header(weights).items():
        inner = _plain_name(key)
        for suffix, (role, parameter) in _FACTORS.items():
            if inner.endswith(f".{suffix}"):
                module = inner.removesuffix(f".{suffix}")
                name = in_file(f"{module}.{parameter}")
                changes.setdefault(name, {})[role] = tensor
                modules[name] = module
                break
        else:
            name = in_file(inner)
            if name not in tensors:
                raise CheckpointError(f"{weights}: nothing uses {key!r}; the base has no {name!r}")
            tensors[name] = _replaced(weights, tensors[name], tensor)
    stored_transposed = config.fan_in_fan_out or stores_transposed(base.config)
    for name, factors in changes.items():
        if set(factors) == {"bias"}:
            change = changes.get(f"{name.removesuffix('bias')}weight", {})
            tensors[name] = _shifted(weights, name, modules[name], factors["bias"], change, tensors, config)
        else:
            tensors[name] = _adapted(weights, name, modules[name], factors, tensors, config, stored_transposed)
    return replace(base, tensors=tensors, adapter=adapter)


def made_for(adapter: Path) -> str | None:
    """The base that an adapter names as its own: a hub id, or a path somewhere."""
    config = file_in(adapter, "adapter_config.json")
    try:
        content = json.loads(config.read_text(encoding="utf-8")) if config is not None else None
    except (OSError, ValueError):
        return None
    named = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return named if isinstance(named, str) and named else None


def _read_config(adapter: Path) -> LoraConfig:
    from peft import LoraConfig, PeftConfig

    if file_in(adapter, "adapter_config.json") is None:
        raise CheckpointError(f"{adapter}: not a PEFT adapter: adapter_config.json is absent")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # PEFT raises anything, down to KeyError for kinds it does not know
        raise CheckpointError(f"{adapter}: PEFT cannot read its configuration: {_first_line(error)}") from None
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise CheckpointError(f"{adapter}: a {kind} adapter; only LoRA can be merged")
    plain = LoraConfig()
    for name, value in vars(config).items():
        if name in _UNDERSTOOD or name.startswith("_") or value == getattr(plain, name, None):
            continue
        raise CheckpointError(
            f"{adapter}: uses {name}, with which the change of the weights may not be s·B·A; merge it with PEFT's "
            "merge_and_unload and name the result"
        )
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _HARMLESS_STARTS:
        raise CheckpointError(
            f"{adapter}: was started with init_lora_weights {config.init_lora_weights!r}, which changes the base's "
            "weights; merge it with PEFT's merge_and_unload and name the result"
        )
    patterns = config.alpha_pattern or {}
    alphas = (config.lora_alpha, *(patterns.values() if isinstance(patterns, dict) else [None]))
    if not all(type(alpha) in (int, float) and abs(alpha) < 1e30 for alpha in alphas):
        raise CheckpointError(f"{adapter}: lora_alpha and alpha_pattern must be numbers")
    for pattern in patterns:
        _check_pattern(adapter, pattern)
    return config


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _check_pattern(adapter: Path, pattern: str) -> None:
    """Refuse what is no regular expression, or one that could take forever: PEFT matches these with names."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        raise CheckpointError(f"{adapter}: alpha_pattern: {pattern!r:.100} is no regular expression") from None
    if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
        raise CheckpointError(f"{adapter}: alpha_pattern: {pattern!r:.100} is too intricate; write out the modules")


def _file_names(base: Checkpoint, adapter: Path, keys: Iterable[str]) -> Callable[[str], str]:
    """From the names of parameters in the model the adapter was made for to those of the base's file.

    Usually they are the same. A file may put a module's name before all of them, and transformers renames modules
    while it loads (a file's ``encoder.layer.0`` is a ViT's ``layers.0``).
    """
    names = []
    for key in keys:
        if not key.startswith(_PREFIX):
            raise CheckpointError(f"{adapter / _WEIGHTS}: {key!r} does not begin with {_PREFIX}")
        inner = _plain_name(key)
        for suffix, (_, parameter) in _FACTORS.items():
            if inner.endswith(f".{suffix}"):
                inner = f"{inner.removesuffix(f'.{suffix}')}.{parameter}"
                break
        names.append(inner)
    if not names:
        raise CheckpointError(f"{adapter / _WEIGHTS}: holds no tensors")
    before = _outer_name(names, base.tensors)
    if before is not None:
        return lambda name: f"{before}{name}"
    renamed = _renamed(base)
    outer = _outer_name(names, renamed) or ""
    return lambda name: renamed.get(outer + name, name)


def _outer_name(names: Sequence[str], known: Mapping[str, object]) -> str | None:
    """What stands before all of these names among known ones, mostly nothing; None if that is not clear."""
    if all(name in known for name in names):
        return ""
    outers = [name.removesuffix(names[0]) for name in known if name.endswith(f".{names[0]}")]
    fitting = [outer for outer in outers if all(outer + name in known for name in names)]
    return fitting[0] if len(fitting) == 1 else None


def _renamed(base: Checkpoint) -> dict[str, str]:
    """Names of parameters in the base's model, each with the one of its file; empty if there is no model to ask."""
    if base.library != "transformers":
        return {}
    from wemoe_plugin.checkpoints.module_names import live_names, transformers_skeleton

    try:
        model = transformers_skeleton(base.path, base.config)
    except Exception:  # transformers raises anything; what does not fit is named by the caller
        model = None
    return {} if model is None else {live: name for name, live in live_names(model, base.tensors).items()}


def _plain_name(key: str) -> str:
    """The name without what PEFT wraps around it; a wrapped layer's own tensors lie in its ``base_layer``."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".")


def _replaced(weights: Path, stored: Source, tensor: StoredTensor) -> StoredTensor:
    if stored.shape != tensor.shape:
        shapes = f"{list(tensor.shape)}, the base {list(stored.shape)}"
        raise CheckpointError(f"{weights}: {tensor.name!r} has shape {shapes}")
    return tensor


def _adapted(
    weights: Path,
    name: str,
    module: str,
    factors: Mapping[str, StoredTensor],
    tensors: Mapping[str, Source],
    config: LoraConfig,
    stored_transposed: bool,
) -> AdaptedTensor:
    if name not in tensors:
        used = next(iter(factors.values())).name
        raise CheckpointError(f"{weights}: nothing uses {used!r}; the base has no {name!r}")
    if set(factors) != {"A", "B"}:
        (role,) = factors
        raise CheckpointError(f"{weights}: {factors[role].name!r} has no other factor beside it")
    stored, down, up = tensors[name], factors["A"], factors["B"]
    if not isinstance(stored, StoredTensor):
        raise CheckpointError(f"{weights}: {name!r} has an adapter already")
    if not (stored.shape and down.elements and up.elements and down.shape and up.shape):
        raise CheckpointError(f"{weights}: the factors of {name!r} are empty or have no axes")
    rank, columns, rows = down.shape[0], math.prod(down.shape[1:]), up.shape[0]
    flat = (stored.shape[0], math.prod(stored.shape[1:]))
    embedding = down.name.endswith("lora_embedding_A")
    transposed = embedding or stored_transposed or (rows, columns) != flat
    if math.prod(up.shape[1:]) != rank or ((columns, rows) if transposed else (rows, columns)) != flat:
        factors_are = f"{down.name!r} {list(down.shape)} and B {list(up.shape)}"
        raise CheckpointError(f"{weights}: {factors_are} do not fit {name!r} {list(stored.shape)}")
    return AdaptedTensor(stored, down, up, _scale(config, module, rank), transposed)


def _shifted(
    weights: Path,
    name: str,
    module: str,
    shift: StoredTensor,
    change: Mapping[str, StoredTensor],
    tensors: Mapping[str, Source],
    config: LoraConfig,
) -> ShiftedTensor:
    """A bias with what the second factor's own bias adds."""
    if name not in tensors:
        raise CheckpointError(f"{weights}: nothing uses {shift.name!r}; the base has no {name!r}")
    if "A" not in change or not change["A"].shape or not change["A"].elements:
        raise CheckpointError(f"{weights}: {shift.name!r} has no factors beside it")
    stored = tensors[name]
    if not isinstance(stored, StoredTensor):
        raise CheckpointError(f"{weights}: {name!r} has an adapter already")
    if stored.shape != shift.shape:
        shapes = f"{list(shift.shape)}, the base {list(stored.shape)}"
        raise CheckpointError(f"{weights}: {shift.name!r} has shape {shapes}")
    return ShiftedTensor(stored, shift, _scale(config, module, change["A"].shape[0]))


def _scale(config: LoraConfig, module: str, rank: int) -> float:
    alpha = _pattern_value(config.alpha_pattern, module, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _pattern_value(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first key that matches a module's name, as PEFT looks it up."""
    from peft.utils.other import get_pattern_key

    patterns = dict(pattern or {})
    return patterns.get(get_pattern_key(list(patterns), module), default)
