"""The wrapper that turns a module into a weight-ensembling mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wemoe_plugin.modeling.ensembled_linear import Routing
from wemoe_plugin.modeling.router import Router


class WeightEnsemblingMoE(nn.Module):
    """Runs the router once on the module's input; the `EnsembledLinear` layers inside use its weights.

    The output of a row never depends on the other rows of its batch. Attributes of the wrapped module remain
    reachable, since networks look into their own MLPs (open_clip reads the dtype of ``mlp.c_fc.weight``).

    Args:
        module: the module; its Linear layers are `EnsembledLinear` and share ``routing``.
        router: gives w, (batch, experts).
        lambdas: λₖ of the static merge; the layers get the offsets w − λ.
        routing: where the layers look for them.

    Source: WEMoE, arXiv 2402.00433, section 3.2, equation 6, in offset form.
    """

    lambdas: Tensor

    def __init__(self, module: nn.Module, router: Router, lambdas: Sequence[float], routing: Routing) -> None:
        super().__init__()
        self.module = module
        self.router = router
        self.routing = routing
        self.register_buffer("lambdas", torch.tensor(lambdas, dtype=torch.float32))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output with each sample's own weights; takes and returns what the module does."""
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        before = self.routing.offsets
        self.routing.offsets = self.router(x) - self.lambdas
        try:
            return self.module(*args, **kwargs)
        finally:
            self.routing.offsets = before

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def wemoe_modules(model: nn.Module) -> Iterator[tuple[str, WeightEnsemblingMoE]]:
    """The upscaled modules of a model with their dotted paths, in order."""
    for path, module in model.named_modules():
        if isinstance(module, WeightEnsemblingMoE):
            yield path, module


def freeze_all_but_routers(model: nn.Module) -> list[nn.Parameter]:
    """Let gradients reach the routers only; returns their parameters, each once."""
    model.requires_grad_(False)
    parameters = {id(p): p for _, module in wemoe_modules(model) for p in module.router.parameters()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return list(parameters.values())
