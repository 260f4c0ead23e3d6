"""Models whose layers store their weights as (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MODEL_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def stores_transposed(config: Mapping[str, Any]) -> bool:
    """Whether a model's layers are transformers' Conv1D, told by its configuration."""
    return config.get("model_type") in _MODEL_TYPES
