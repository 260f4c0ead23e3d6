"""The forms of task vectors inside a Linear layer: each holds the static weight too and applies both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from wemoe_plugin.modeling.composition import WORKING_BYTES, SparseVectors, apply_dense, apply_low_rank, apply_sparse


class DenseForm(nn.Module):
    """Every task vector whole, stacked behind the static weight.

    Args:
        weight: W_static, (out, in).
        bias: b_static, (out,), or None.
        vectors: τ, (experts, out, in).
        bias_vectors: τ of the bias, (experts, out), or None.
        working_bytes: the most that composed weights take at a time.
    """

    name = "dense"
    stack: Tensor
    bias: Tensor | None
    bias_vectors: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        vectors: Float[Tensor, "experts out in"],
        bias_vectors: Float[Tensor, "experts out"] | None = None,
        working_bytes: int = WORKING_BYTES,
    ) -> None:
        super().__init__()
        self.working_bytes = working_bytes
        self.register_buffer("stack", torch.cat([weight.detach().unsqueeze(0), vectors]))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("bias_vectors", bias_vectors)

    @property
    def weight(self) -> Tensor:
        return self.stack[0]

    def forward(
        self, x: Float[Tensor, "batch tokens in"], offsets: Float[Tensor, "batch experts"]
    ) -> Float[Tensor, "batch tokens out"]:
        biases = _biases(offsets, self.bias, self.bias_vectors)
        return apply_dense(x, offsets, self.stack, biases, self.working_bytes)


class SparseForm(nn.Module):
    """The largest entries of every task vector, by magnitude.

    Args:
        weight: W_static, (out, in).
        bias: b_static, (out,), or None.
        values: (experts, count).
        indices: where they stand in the row-major matrix, ascending, (experts, count).
        bias_vectors: τ of the bias, (experts, out), or None.
        working_bytes: the most that composed weights take at a time.

    Source: E-WEMoE, arXiv 2410.21804, section 3.2.
    """

    name = "sparse"
    weight: Tensor
    bias: Tensor | None
    values: Tensor
    indices: Tensor
    bias_vectors: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        values: Float[Tensor, "experts count"],
        indices: Int[Tensor, "experts count"],
        bias_vectors: Float[Tensor, "experts out"] | None = None,
        working_bytes: int = WORKING_BYTES,
    ) -> None:
        super().__init__()
        self.working_bytes = working_bytes
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("values", values)
        self.register_buffer("indices", indices)
        self.register_buffer("bias_vectors", bias_vectors)
        self._starts = _row_starts(indices, *weight.shape)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._starts = _row_starts(self.indices, *self.weight.shape)

    def forward(
        self, x: Float[Tensor, "batch tokens in"], offsets: Float[Tensor, "batch experts"]
    ) -> Float[Tensor, "batch tokens out"]:
        vectors = SparseVectors(self.values, self.indices, self._starts)
        biases = _biases(offsets, self.bias, self.bias_vectors)
        return apply_sparse(x, offsets, self.weight, vectors, biases, self.working_bytes)


class LowRankForm(nn.Module):
    """Two thin factors of every task vector: τₖ ≈ upₖᵀ downₖ. The only form that can route token by token.

    Args:
        weight: W_static, (out, in).
        bias: b_static, (out,), or None.
        down: of all experts, the first expert's first, (Σ ranks, in).
        up: likewise, (Σ ranks, out).
        ranks: of each expert; they need not be equal.
        bias_vectors: τ of the bias, (experts, out), or None.
    """

    name = "low_rank"
    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    owners: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        down: Float[Tensor, "ranks in"],
        up: Float[Tensor, "ranks out"],
        ranks: Sequence[int],
        bias_vectors: Float[Tensor, "experts out"] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("down", down)
        # Biases that move are ranks whose input is one: applied with the rest, they take no pass of their own.
        self.register_buffer("up", up if bias_vectors is None else torch.cat([up, bias_vectors]))
        owners = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        self.register_buffer("owners", owners.to(down.device))

    def forward(
        self, x: Float[Tensor, "batch tokens in"], offsets: Float[Tensor, "batch *tokens experts"]
    ) -> Float[Tensor, "batch tokens out"]:
        return apply_low_rank(x, offsets, self.weight, self.bias, self.down, self.up, self.owners)


Form = DenseForm | SparseForm | LowRankForm


def _biases(offsets: Tensor, bias: Tensor | None, vectors: Tensor | None) -> Tensor | None:
    """Each sample's bias, (batch, out), or one for all, (1, out)."""
    if bias is None or vectors is None:
        return None if bias is None else bias.unsqueeze(0)
    return torch.addmm(bias, offsets.to(bias.dtype), vectors)


def _row_starts(indices: Tensor, rows: int, columns: int) -> Tensor:
    """How many entries of each expert lie above each output row, (experts, rows + 1)."""
    edges = torch.arange(rows + 1, dtype=torch.int64) * columns
    return torch.stack([torch.searchsorted(own.cpu().long().contiguous(), edges) for own in indices])
