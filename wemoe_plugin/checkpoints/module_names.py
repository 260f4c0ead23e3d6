"""What the library of a checkpoint calls its tensors: modules may be named otherwise than files name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def transformers_class(config: Mapping[str, Any]) -> Any:
    """The class that a configuration names, or None."""
    import transformers

    names = config.get("architectures") or []
    return getattr(transformers, names[0], None) if names else None


def transformers_skeleton(directory: Path, config: Mapping[str, Any]) -> nn.Module | None:
    """A directory's model without memory for its weights; None if its class is not named.

    Raises:
        Exception: of any kind, if the library cannot build it.
    """
    kind = transformers_class(config)
    if kind is None:
        return None
    with torch.device("meta"):
        return kind(kind.config_class.from_pretrained(directory, local_files_only=True))  # type: ignore[no-any-return]


def live_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Names of a checkpoint's tensors, each with its parameter's name in a model.

    transformers renames modules while it loads (ViT's ``intermediate.dense`` is ``mlp.fc1`` since version 5), and it
    and open_clip accept files whose names lack the outermost module's or have it in excess.

    Args:
        model: built by its library.
        names: of tensors in the checkpoint.

    Returns:
        Those that have a parameter.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rename = _renaming(model, known)
    prefix = getattr(model, "base_model_prefix", "")
    found = {}
    for name in names:
        for candidate in (name, rename(name), name.partition(".")[2], f"{prefix}.{name}"):
            if candidate in known:
                found[name] = candidate
                break
    return found


def _renaming(model: nn.Module, known: set[str]) -> Callable[[str], str]:
    """How transformers renames what it reads for this model; other libraries rename nothing."""
    if not hasattr(model, "base_model_prefix"):
        return lambda name: name
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    # What these make is another tensor than the file's; a name that only they lead to is not found here.
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    parameters = dict.fromkeys(known, True)

    def rename(name: str) -> str:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        return name if converter is not None else renamed

    return rename
