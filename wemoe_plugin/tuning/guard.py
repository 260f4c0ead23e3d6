"""Notice when predictions collapse onto few classes, which entropy rewards and no label would show."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SHARE = 0.5
"""Predictions on fewer than this share of the classes used before tuning count as collapsed."""


def effective_classes(logits: Tensor) -> float:
    """How many classes the predictions are spread over: exp of the entropy of the predicted classes.

    Args:
        logits: (rows, classes).

    Returns:
        From 1, all rows the same class, to the number of classes.
    """
    counts = torch.bincount(logits.argmax(-1), minlength=logits.shape[-1]).double()
    shares = counts[counts > 0] / counts.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def has_collapsed(before: float, now: float) -> bool:
    """Whether predictions are spread over much fewer classes than before tuning."""
    return now < LEAST_SHARE * before
