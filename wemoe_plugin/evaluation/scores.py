"""Accuracies of base, experts, static merge and merged model, task by task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

COLUMNS = ("base", "expert", "static", "merged")
"""The models that are compared, in the order of the tables."""


@dataclass(frozen=True)
class Scores:
    """Accuracies in [0, 1].

    Attributes:
        tasks: by task, then by column.
        seconds: what took how long.
        routing: mean routing weights by task and upscaled module, one per expert.
        experts: their names, in the order of the routing weights.
    """

    tasks: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float] = field(default_factory=dict)
    routing: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    experts: Sequence[str] = ()

    @property
    def mean(self) -> dict[str, float]:
        """The mean over tasks, by column."""
        return {column: sum(row[column] for row in self.tasks.values()) / len(self.tasks) for column in COLUMNS}

    @property
    def kept(self) -> float:
        """The merged model's share of its experts' mean accuracy."""
        mean = self.mean
        return mean["merged"] / mean["expert"] if mean["expert"] else 0.0

    def to_json(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return {
            "tasks": {name: dict(row) for name, row in self.tasks.items()},
            "mean": self.mean,
            "kept": self.kept,
            "seconds": dict(self.seconds),
            "experts": list(self.experts),
            "routing": {task: {m: list(w) for m, w in rows.items()} for task, rows in self.routing.items()},
        }


@torch.inference_mode()
def predict(
    model: nn.Module,
    encode: Callable[[nn.Module, Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    inputs: Callable[[Sequence[int]], Tensor],
    rows: int,
    batch_size: int = 128,
) -> Tensor:
    """Logits (rows, classes) of a model for all rows of a data set."""
    pieces = [range(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]
    return torch.cat([head(encode(model, inputs(piece))) for piece in pieces])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest logit is at their label; logits (rows, classes), labels (rows,)."""
    return float((logits.argmax(-1) == labels.to(logits.device)).double().mean())
