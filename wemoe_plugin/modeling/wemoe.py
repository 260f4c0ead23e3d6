"""The wrapper that turns a module into a weight-ensembling mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wemoe_plugin.modeling.ensembled_linear import Routing
from wemoe_plugin.modeling.router import Router
from wemoe_plugin.modeling.sequence import SequenceState


class WeightEnsemblingMoE(nn.Module):
    """Runs the router once on the module's input; the `EnsembledLinear` layers inside use its weights.

    The output of a row never depends on the other rows of its batch. Attributes of the wrapped module remain
    reachable, since networks look into their own MLPs (open_clip reads the dtype of ``mlp.c_fc.weight``).

    Args:
        module: the module; its Linear layers are `EnsembledLinear` and share ``routing``.
        router: gives w, (batch, experts), or one per token, (batch, tokens, experts).
        lambdas: λₖ of the static merge; the layers get the offsets w − λ.
        routing: where the layers look for them.
        sequence: what the model around knows of padding and of earlier tokens; None where there is neither, or where
            the router decides per token.
        argument: which positional argument of the module the router reads.
        path: of the module in its model, under which ``sequence`` keeps its decisions.
        router_name: of the router in its directory.

    Source: WEMoE, arXiv 2402.00433, section 3.2, equation 6, in offset form.
    """

    lambdas: Tensor

    def __init__(
        self,
        module: nn.Module,
        router: Router,
        lambdas: Sequence[float],
        routing: Routing,
        sequence: SequenceState | None = None,
        argument: int = 0,
        path: str = "",
        router_name: str = "",
    ) -> None:
        super().__init__()
        self.module = module
        self.router = router
        self.routing = routing
        self.sequence = sequence
        self.argument = argument
        self.path = path
        self.router_name = router_name
        self.register_buffer("lambdas", torch.tensor(lambdas, dtype=torch.float32))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output with each sample's own weights; takes and returns what the module does."""
        x = input_of(args, kwargs, self.argument)
        assert isinstance(x, Tensor), "the router reads a tensor"
        before = self.routing.offsets
        self.routing.offsets = self._offsets(self._weights(x))
        try:
            return self.module(*args, **kwargs)
        finally:
            self.routing.offsets = before

    def _weights(self, x: Tensor) -> Tensor:
        if self.sequence is None:
            weights: Tensor = self.router(x)
            return weights
        return self.sequence.decide(self.path, x, self.router)

    def _offsets(self, weights: Tensor) -> Tensor:
        if weights.stride(0) == 0 and weights.shape[0] > 1:  # one decision for all, which layers compose once
            return (weights[:1] - self.lambdas.to(weights.dtype)).expand(weights.shape)
        return weights - self.lambdas.to(weights.dtype)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any], argument: int) -> Any:
    """What the router of a module that is called with these arguments reads; None if it is not among them."""
    if len(args) > argument:
        return args[argument]
    named = [value for value in kwargs.values() if isinstance(value, Tensor)]
    return named[argument - len(args)] if argument - len(args) < len(named) else None


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
