"""A slow, obvious WEMoE: every sample gets its own copy of the module, with its own weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def composed(base: nn.Module, experts: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module:
    """A plain module with θ₀ + Σₖ wₖ (θₖ − θ₀) for every parameter."""
    result = copy.deepcopy(base)
    originals = dict(base.named_parameters())
    tuned = [dict(expert.named_parameters()) for expert in experts]
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            parameter.copy_(
                originals[name] + sum(w * (own[name] - originals[name]) for w, own in zip(weights, tuned, strict=True))
            )
    return result


def router_weights(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The paper's router on one sample (tokens, width): the logits of every token, then their mean."""
    logits = []
    for token in x:
        hidden = token
        for i, (weight, bias) in enumerate(layers):
            hidden = weight @ hidden + bias
            if i < len(layers) - 1:
                hidden = hidden.clamp_min(0)
        logits.append(hidden)
    return torch.stack(logits).mean(0)


def wemoe_forward(base: nn.Module, experts: Sequence[nn.Module], weights: Tensor, x: Tensor) -> Tensor:
    """Each row of x (batch, tokens, width) through a module composed by its row of weights (batch, experts)."""
    return torch.cat([composed(base, experts, weights[b].tolist())(x[b : b + 1]) for b in range(len(x))])
