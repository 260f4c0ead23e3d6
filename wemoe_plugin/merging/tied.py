"""Tied weights: one matrix under two names, of which some files keep both and some keep one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from wemoe_plugin.checkpoints.checkpoint import Checkpoint
from wemoe_plugin.checkpoints.sources import Source

_EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_BIASES = ("predictions.bias",)
_COPIES = (
    *("lm_head.weight", "embed_out.weight", "predictions.decoder.weight", "vocab_projector.weight"),
    *("predictions.decoder.bias",),
    *("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
)


@dataclass(frozen=True)
class Twins:
    """Two tensors of one model that must hold the same values, since another model keeps only one of them."""

    kept: Source
    dropped: Source


def tie(expert: Checkpoint, base: Checkpoint) -> tuple[Checkpoint, list[Twins], list[str]]:
    """The expert with the tied weights the base has, neither more nor fewer.

    A copy that only the expert keeps is left out. A copy that only the base keeps is, for the expert, the matrix it is
    tied to. Whether either is a copy is to be seen before merging, and for the latter no configuration may deny it.

    Returns:
        The expert, what must be equal, and a line for the plan about each weight that was left out or filled in.
    """
    tensors: dict[str, Source] = dict(expert.tensors)
    twins, notes = [], []
    for name in [name for name in tensors if name not in base.tensors and name.endswith(_COPIES)]:
        original = _original(name, tensors, base.tensors)
        if original is not None:
            twins.append(Twins(tensors[original], tensors.pop(name)))
            notes.append(f"{name} is left out: the base ties it to {original}")
    if not any(_denies(model.config) for model in (expert, base)):
        for name in [name for name in base.tensors if name not in tensors and name.endswith(_COPIES)]:
            original = _original(name, {**tensors, name: base.tensors[name]}, base.tensors)
            if original is not None:
                tensors[name] = tensors[original]
                twins.append(Twins(base.tensors[original], base.tensors[name]))
                notes.append(f"{name} is its {original}, to which it is tied")
    return replace(expert, tensors=tensors), twins, notes


def _denies(config: Mapping[str, Any]) -> bool:
    parts = (config, config.get("text_config"))
    return any(isinstance(part, Mapping) and part.get("tie_word_embeddings") is False for part in parts)


def _original(copy: str, tensors: Mapping[str, Source], base: Mapping[str, Source]) -> str | None:
    """The embedding, held by the expert and by the base, that a tensor can be a copy of."""
    shape = tensors[copy].shape
    fitting: Iterable[str] = (
        name
        for suffix in (*_EMBEDDINGS, *_BIASES)
        for name in tensors
        if name.endswith(suffix) and name != copy and name in base and tensors[name].shape == shape
    )
    return next(iter(fitting), None)
