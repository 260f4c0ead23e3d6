"""Small upscaled modules, built as `attach` builds them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from models import Mlp, fine_tuned
from reference import composed
from torch import Tensor, nn

from wemoe_plugin.modeling.ensembled_linear import EnsembledLinear, Routing
from wemoe_plugin.modeling.forms import DenseForm, Form, LowRankForm, SparseForm
from wemoe_plugin.modeling.router import Router
from wemoe_plugin.modeling.wemoe import WeightEnsemblingMoE
from wemoe_plugin.task_vectors.low_rank import truncated_svd

WIDTH, HIDDEN, TOKENS, BATCH = 12, 20, 5, 4

FORMS = ["dense", "low_rank", "sparse"]

forms = pytest.mark.parametrize("form", FORMS)


def family(experts: int, dtype: torch.dtype = torch.float32) -> tuple[Mlp, list[nn.Module]]:
    torch.manual_seed(0)
    base = Mlp(WIDTH, HIDDEN).to(dtype)
    return base, [fine_tuned(base, seed, 0.2) for seed in range(experts)]


def form_of(kind: str, linear: nn.Linear, vectors: Tensor, biases: Tensor | None) -> Form:
    """A form that keeps task vectors exactly: of full rank, of full density."""
    weight, bias = linear.weight, linear.bias
    if kind == "dense":
        return DenseForm(weight, bias, vectors, biases)
    if kind == "sparse":
        entries = torch.arange(weight.numel(), dtype=torch.int32).expand(len(vectors), -1).contiguous()
        return SparseForm(weight, bias, vectors.flatten(1).clone(), entries, biases)
    pairs = [truncated_svd(vector, min(weight.shape)) for vector in vectors]
    down, up = (torch.cat(factors).to(weight.dtype) for factors in zip(*pairs, strict=True))
    return LowRankForm(weight, bias, down, up, [min(weight.shape)] * len(vectors), biases)


def upscaled(
    base: nn.Module,
    experts: Sequence[nn.Module],
    depth: int = 2,
    form: str = "dense",
    lam: float = 0.3,
    per_token: bool = False,
) -> WeightEnsemblingMoE:
    """The module as `attach` builds it."""
    lambdas, routing = [lam] * len(experts), Routing()
    static = composed(base, experts, lambdas)
    for name in ("fc1", "fc2"):
        layer, own = getattr(base, name), [getattr(expert, name) for expert in experts]
        vectors = torch.stack([e.weight - layer.weight for e in own]).detach()
        biases = torch.stack([e.bias - layer.bias for e in own]).detach()
        target = getattr(static, name)
        setattr(static, name, EnsembledLinear(form_of(form, target, vectors, biases), routing))
    generator = torch.Generator().manual_seed(1)
    router = Router(WIDTH, len(experts), depth, lambdas, generator, per_token).to(base.fc1.weight.dtype)
    return WeightEnsemblingMoE(static, router, lambdas, routing).to(base.fc1.weight.dtype)


def stirred(module: WeightEnsemblingMoE, scale: float = 0.5) -> WeightEnsemblingMoE:
    """With a router that has something to say."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.router.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
    return module


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)


class Fixed(nn.Module):
    """A router that gives the weights it was told."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return self.weights.expand(x.shape[0], -1)


depths = pytest.mark.parametrize("depth", [0, 1, 2])


def linear(experts: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = (BATCH, TOKENS, WIDTH), (BATCH, experts), (HIDDEN, WIDTH), (experts, HIDDEN, WIDTH)
    x, offsets, weight, vectors = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return x, offsets, weight, vectors
