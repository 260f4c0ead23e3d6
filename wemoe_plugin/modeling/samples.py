"""Made-up inputs for a model of any kind and its outputs by row: to see whether models agree, not what they know."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wemoe_plugin.errors import CheckpointError

_TOKENS = 8
"""Length of a made-up text."""

_OF_THE_BATCH = ("logits_per_image", "logits_per_text", "loss")
"""Outputs that compare the rows of a batch with each other."""


def sample_inputs(model: nn.Module, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random images or texts, whichever the model takes, as keyword arguments of its forward pass.

    Args:
        model: of open_clip or transformers.
        rows: images or texts.
        generator: draws them.

    Returns:
        The inputs; texts hold no token 0.

    Raises:
        CheckpointError: what the model takes is not known.
    """
    try:
        inputs = _inputs(model, rows, generator)
    except (AttributeError, TypeError, RuntimeError):  # a configuration that does not say how large things are
        inputs = {}
    if not inputs:
        raise CheckpointError(f"what a {type(model).__name__} takes is not known: neither images nor texts")
    return inputs


def _inputs(model: nn.Module, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    taken = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    inputs: dict[str, Tensor] = {}
    like = next(model.parameters())

    def image(channels: int, height: int, width: int) -> Tensor:
        return torch.randn(rows, channels, height, width, generator=generator).to(like.device, like.dtype)

    def text(vocabulary: int, length: int) -> Tensor:
        return torch.randint(1, vocabulary, (rows, length), generator=generator).to(like.device)

    if config is None and "image" in taken and hasattr(model, "visual"):
        height, width = _pair(model.visual.image_size)  # type: ignore[union-attr]
        inputs["image"] = image(3, height, width)
        inputs["text"] = text(int(model.vocab_size), int(model.context_length))  # type: ignore[arg-type]
    if "pixel_values" in taken:
        vision = getattr(config, "vision_config", config)
        height, width = _pair(getattr(vision, "image_size", None) or 224)
        inputs["pixel_values"] = image(getattr(vision, "num_channels", 3), height, width)
    if "input_ids" in taken:
        settings = getattr(config, "text_config", config)
        length = min(_TOKENS, getattr(settings, "max_position_embeddings", _TOKENS) or _TOKENS)
        inputs["input_ids"] = text(settings.vocab_size, length)
        if "decoder_input_ids" in taken:
            inputs["decoder_input_ids"] = text(settings.vocab_size, length)
    return inputs


@torch.no_grad()
def outputs_by_row(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model gives for each row, by name; outputs that compare rows with each other are left out.

    Raises:
        CheckpointError: the model cannot be run on such inputs.
    """
    try:
        found: Any = model(**inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"this {type(model).__name__} cannot be run on made-up inputs: {why}") from error
    rows = next(iter(inputs.values())).shape[0]
    named = found if isinstance(found, Mapping) else dict(enumerate(found if isinstance(found, tuple) else [found]))
    return {
        str(name): value
        for name, value in named.items()
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows and name not in _OF_THE_BATCH
    }


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)
