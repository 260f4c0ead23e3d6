"""What tuning minimizes, as functions of logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions, in nats.

    Args:
        logits: (batch, classes).

    Source: test-time adaptation as in AdaMerging (arXiv 2310.02575) and WEMoE (arXiv 2402.00433, section 3.4).
    """
    log_probabilities = F.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()


def infomax(logits: Tensor) -> Tensor:
    """Entropy of each prediction less the entropy of their mean: confident, and spread over the classes.

    Args:
        logits: (batch, classes).

    Source: SHOT, arXiv 2002.08546, equation 3.
    """
    mean = F.softmax(logits, dim=-1).mean(0)
    return entropy(logits) + (mean * mean.clamp_min(1e-12).log()).sum()


def distill(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL divergence from the predictions of the task's own expert, in nats.

    Args:
        logits: (batch, classes).
        teacher: the expert's logits, (batch, classes).

    Source: knowledge distillation, arXiv 1503.02531, at temperature 1.
    """
    target = F.log_softmax(teacher, dim=-1)
    return F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="batchmean", log_target=True)
