"""Give a partial expert the base's names: a vision tower saved alone names its tensors without the outer module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from wemoe_plugin.checkpoints.checkpoint import Checkpoint
from wemoe_plugin.checkpoints.sources import Source


def align(expert: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The expert under the base's names.

    If no name of the expert is the base's, but one outer name (such as ``vision_model.``), put before every name of
    the expert or taken away from it, makes all of them the base's, the expert is read under those names. Anything
    else is left as it is, for the plan to refuse.
    """
    if not expert.tensors or any(name in base.tensors for name in expert.tensors):
        return expert
    renamed = _with_prefix(expert.tensors, base.tensors) or _without_prefix(expert.tensors, base.tensors)
    return expert if renamed is None else replace(expert, tensors=renamed)


def _with_prefix(tensors: Mapping[str, Source], base: Mapping[str, Source]) -> dict[str, Source] | None:
    first = next(iter(tensors))
    prefixes = [name.removesuffix(first) for name in base if name.endswith(f".{first}")]
    fitting = [prefix for prefix in prefixes if all(prefix + name in base for name in tensors)]
    if len(fitting) != 1:
        return None
    return {fitting[0] + name: tensor for name, tensor in tensors.items()}


def _without_prefix(tensors: Mapping[str, Source], base: Mapping[str, Source]) -> dict[str, Source] | None:
    prefix = next(iter(tensors)).partition(".")[0] + "."
    renamed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return renamed if len(renamed) == len(tensors) and all(name in base for name in renamed) else None
