"""The router: from a module's input to one weight per sample and expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

INIT_STD = 0.01
"""Standard deviation of the hidden layer's initial weights (arXiv 2402.00433, section 3.3)."""


class Router(nn.Module):
    """w_b = meanₙ R(h_bn), without softmax: weights may be negative or exceed one.

    R is by ``depth`` 2: Linear(width, width), ReLU, Linear(width, experts); 1: Linear(width, experts); 0: a constant
    vector. The hidden layer starts at N(0, 0.01²) with bias 0 and the last bias at λₖ, as in the paper. The last
    layer's weights start at zero where the paper draws them too: so a fresh router gives exactly λ, and a freshly
    upscaled model is exactly its static merge.

    With ``per_token`` every token has weights of its own: w_bn = R(h_bn).

    Source: WEMoE, arXiv 2402.00433, section 3.3; depth 0 in every layer is layer-wise AdaMerging, arXiv 2310.02575.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        depth: int,
        lambdas: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        per_token: bool = False,
    ) -> None:
        super().__init__()
        if depth not in (0, 1, 2):
            raise ValueError(f"a router has depth 0, 1 or 2, not {depth}")
        self.width, self.experts, self.depth, self.per_token = width, experts, depth, per_token
        self.hidden = nn.Linear(width, width) if depth == 2 else None
        self.output = nn.Linear(width, experts) if depth else None
        self.constant = nn.Parameter(torch.zeros(experts)) if depth == 0 else None
        self.reset(lambdas or [0.0] * experts, generator)

    @torch.no_grad()
    def reset(self, lambdas: Sequence[float], generator: torch.Generator | None = None) -> None:
        """Set the initial values; ``lambdas`` are the weights a fresh router gives, one per expert."""
        if self.hidden is not None:
            self.hidden.weight.normal_(0.0, INIT_STD, generator=generator)
            self.hidden.bias.zero_()
        if self.output is not None:
            self.output.weight.zero_()
            self.output.bias.copy_(torch.tensor(lambdas))
        if self.constant is not None:
            self.constant.copy_(torch.tensor(lambdas))

    def forward(
        self, x: Float[Tensor, "batch *tokens width"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch *each experts"]:
        """One weight per sample and expert, the logits averaged over whatever lies between batch and width.

        Per token, nothing is averaged, and no token's weights depend on another's.

        Args:
            x: the module's input.
            mask: which tokens enter the mean; default all. A row without any gets the last layer's bias.
        """
        if self.constant is not None:
            return self.constant.expand(*(x.shape[:-1] if self.per_token else x.shape[:1]), -1)
        assert self.output is not None
        x = x.to(self.output.weight.dtype)  # which may be another than the module's: some keep single layers in float32
        hidden = x if self.hidden is None else torch.relu(self.hidden(x))
        # The last layer is linear: averaging before it gives the mean of the logits for a fraction of the work.
        if not self.per_token and mask is not None:
            count = mask.sum(1, keepdim=True).clamp_min(1)
            hidden = (mask.to(hidden.dtype).unsqueeze(1) @ hidden).squeeze(1) / count
        elif not self.per_token and hidden.ndim > 2:
            hidden = hidden.flatten(1, -2).mean(1)
        weights: Tensor = self.output(hidden)
        return weights

    def extra_repr(self) -> str:
        unit = ", per_token=True" if self.per_token else ""
        return f"width={self.width}, experts={self.experts}, depth={self.depth}{unit}"
