"""Models whose layers store their weights as (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CONV1D = ("Conv1D", "transformers.pytorch_utils")
_MODEL_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def stores_transposed(config: Mapping[str, Any]) -> bool:
    """Whether a model's layers are transformers' Conv1D, told by its configuration."""
    return config.get("model_type") in _MODEL_TYPES


def is_conv1d(module: object) -> bool:
    """Whether a layer is transformers' Conv1D; transformers need not be imported."""
    return (type(module).__name__, type(module).__module__) == _CONV1D
