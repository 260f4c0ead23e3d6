"""A Linear layer whose weights are composed per sample from a static merge and task vectors."""

from __future__ import annotations

import threading
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wemoe_plugin.modeling.composition import apply_dense, apply_low_rank


class Routing(threading.local):
    """The offsets of the forward pass that is under way, shared by a module's layers; one per thread.

    Attributes:
        offsets: w_bk − λₖ, (batch, experts); None outside of a forward pass.
    """

    offsets: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Routing, ()


class EnsembledLinear(nn.Module):
    """W_b = W_static + Σₖ o_bk τₖ, the offset form; without offsets the static layer.

    ``weight`` and ``bias`` keep the names and values of the ordinary checkpoint. Everything here is frozen; gradients
    reach the offsets and the input only.

    Args:
        linear: the layer to take over; its tensors are shared, not copied.
        routing: where the wrapper puts the offsets.
        weight_vectors: τ of the weight, (experts, out, in); or None if ``factors`` are given or only the bias moves.
        factors: A (experts, rank, in) and B (experts, out, rank) with τₖ ≈ Bₖ Aₖ.
        bias_vectors: τ of the bias, (experts, out).
    """

    weight: Tensor
    bias: Tensor | None
    weight_vectors: Tensor | None
    bias_vectors: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        routing: Routing,
        weight_vectors: Tensor | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
        bias_vectors: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.routing = routing
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        down, up = factors or (None, None)
        for name, value in (
            ("weight_vectors", weight_vectors),
            ("bias_vectors", bias_vectors),
            ("down", down),
            ("up", up),
        ):
            self.register_buffer(name, value)

    def forward(self, x: Float[Tensor, "batch *tokens in"]) -> Float[Tensor, "batch *tokens out"]:
        """Apply the layer with each sample's own weights."""
        offsets = self.routing.offsets
        if offsets is None:
            return F.linear(x, self.weight, self.bias)
        if offsets.shape[0] != x.shape[0]:
            raise ValueError(
                f"a batch of {offsets.shape[0]} was routed, but this layer sees {x.shape[0]} rows: the module mixes "
                "batch and tokens on the way, and its weights cannot be decided per sample"
            )
        offsets = offsets.to(self.weight.dtype)
        flat = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        if self.weight_vectors is not None:
            y = apply_dense(flat, offsets, self.weight, self.weight_vectors)
        else:
            y = F.linear(flat, self.weight)
            if self.down is not None and self.up is not None:
                y = y + apply_low_rank(flat, offsets, self.down, self.up)
        if self.bias is not None:
            y = y + self._biases(offsets).unsqueeze(1).to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _biases(self, offsets: Float[Tensor, "batch experts"]) -> Float[Tensor, "#batch out"]:
        assert self.bias is not None
        if self.bias_vectors is None:
            return self.bias.unsqueeze(0)
        return self.bias + offsets @ self.bias_vectors

    def extra_repr(self) -> str:
        form = "dense" if self.weight_vectors is not None else "low_rank" if self.down is not None else "bias only"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {form}"
