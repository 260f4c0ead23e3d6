"""A Linear layer whose weights are composed per sample from a static merge and task vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wemoe_plugin.modeling.forms import Form, LowRankForm
from wemoe_plugin.modeling.per_thread import PerThread


class Routing:
    """The offsets of the forward pass that is under way, shared by a module's layers.

    Attributes:
        offsets: w − λ, (batch, experts), or with token routing (batch, tokens, experts); None outside of a forward
            pass.
    """

    def __init__(self) -> None:
        self._offsets: PerThread[Tensor | None] = PerThread(None)

    @property
    def offsets(self) -> Tensor | None:
        return self._offsets.get()

    @offsets.setter
    def offsets(self, value: Tensor | None) -> None:
        self._offsets.set(value)


class EnsembledLinear(nn.Module):
    """W_b = W_static + Σₖ o_bk τₖ, the offset form; without offsets the static layer.

    Everything here is frozen; gradients reach the offsets and the input only.

    Args:
        form: the static weight and bias with their task vectors.
        routing: where the wrapper puts the offsets.
    """

    def __init__(self, form: Form, routing: Routing) -> None:
        super().__init__()
        self.form = form
        self.routing = routing
        self.out_features, self.in_features = form.weight.shape

    @property
    def weight(self) -> Tensor:
        """W_static, (out, in)."""
        return self.form.weight

    @property
    def bias(self) -> Tensor | None:
        """b_static, (out,)."""
        return self.form.bias

    def forward(self, x: Float[Tensor, "batch *tokens in"]) -> Float[Tensor, "batch *tokens out"]:
        """Apply the layer with each sample's own weights."""
        offsets = self.routing.offsets
        if offsets is None:
            if torch._C._current_graph_task_id() != -1:
                raise ValueError(
                    "a layer inside of an upscaled module is computed again in the backward pass, where its routing is "
                    "not known: turn gradient checkpointing off, or upscale smaller modules, such as mlp"
                )
            return F.linear(x, self.weight, self.bias)
        if offsets.shape[0] != x.shape[0]:
            raise ValueError(
                f"a batch of {offsets.shape[0]} was routed, but this layer sees {x.shape[0]} rows: the module mixes "
                "batch and tokens on the way, and its weights cannot be decided per sample"
            )
        offsets = offsets.to(self.weight.dtype)
        flat = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        if offsets.ndim > 2:
            offsets = self._per_token(offsets.flatten(1, -2), flat)
        y: Tensor = self.form(flat, offsets)
        return y.view(*x.shape[:-1], self.out_features)

    def _per_token(self, offsets: Tensor, x: Tensor) -> Tensor:
        if not isinstance(self.form, LowRankForm):
            raise ValueError(f"token routing needs low-rank task vectors, not {self.form.name} ones")
        if offsets.shape[1] != x.shape[1]:
            raise ValueError(
                f"{offsets.shape[1]} tokens were routed, but this layer sees {x.shape[1]}: it reads other tokens than "
                "its module's input (as cross-attention does); use routing: sample"
            )
        return offsets

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
