"""y_b = x_b (W + Σₖ o_bk τₖ)ᵀ for a whole batch: each sample with its own weights, none of them kept."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

WORKING_BYTES = 16 * 2**20
"""The most that the composed weights of one layer take at a time.

Small on purpose: a band that stays in the cache, and below the size from which the allocator fetches fresh pages for
every use, makes the layer nearly twice as fast on a CPU as one of 64 MiB (benchmarks/LOG.md)."""


def apply_dense(
    x: Float[Tensor, "batch tokens in"],
    offsets: Float[Tensor, "batch experts"],
    weight: Float[Tensor, "out in"],
    vectors: Float[Tensor, "experts out in"],
    working_bytes: int = WORKING_BYTES,
) -> Float[Tensor, "batch tokens out"]:
    """Apply dense task vectors.

    Composes the weights of all samples for a band of output rows, uses them, and goes on to the next band, so memory
    is bounded whatever the batch. Differentiable in ``x`` and ``offsets`` only: weights and task vectors are frozen.
    The backward pass composes the weights again instead of keeping them. Under autocast the products are taken in its
    dtype, as those of a Linear layer are; weights are composed in their own.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        y: Tensor = _DenseComposition.apply(x, offsets.to(weight.dtype), weight, vectors, working_bytes)
    return y


def apply_low_rank(
    x: Float[Tensor, "batch tokens in"],
    offsets: Float[Tensor, "batch experts"],
    down: Float[Tensor, "experts rank in"],
    up: Float[Tensor, "experts out rank"],
) -> Float[Tensor, "batch tokens out"]:
    """What low-rank task vectors add: ((x Aᵀ) ⊙ offsets) Bᵀ with the factors of all experts stacked."""
    rank = down.shape[1]
    thin = x @ down.flatten(0, 1).T
    thin = thin * offsets.repeat_interleave(rank, dim=1).unsqueeze(1)
    return thin @ up.transpose(0, 1).flatten(1).T


def _bands(batch: int, weight: Tensor, working_bytes: int) -> list[slice]:
    row = batch * weight.shape[1] * weight.element_size()
    step = max(1, min(weight.shape[0], working_bytes // max(row, 1)))
    return [slice(start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step)]


def _compose(offsets: Tensor, weight: Tensor, vectors: Tensor, band: slice) -> Tensor:
    """The weights (batch, band, in) of every sample for a band of output rows."""
    flat = torch.addmm(weight[band].reshape(1, -1), offsets, vectors[:, band].flatten(1))
    return flat.view(offsets.shape[0], band.stop - band.start, weight.shape[1])


class _DenseComposition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, weight: Tensor, vectors: Tensor, working_bytes: int) -> Tensor:
        ctx.save_for_backward(x, offsets, weight, vectors)
        ctx.working_bytes = working_bytes
        y = x.new_empty(*x.shape[:2], weight.shape[0])
        for band in _bands(x.shape[0], weight, working_bytes):
            y[:, :, band] = x @ _compose(offsets, weight, vectors, band).to(x.dtype).mT
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, offsets, weight, vectors = ctx.saved_tensors
        wants_x, wants_offsets = ctx.needs_input_grad[:2]
        grad_x = torch.zeros_like(x) if wants_x else None
        grad_offsets = torch.zeros_like(offsets) if wants_offsets else None
        for band in _bands(x.shape[0], weight, ctx.working_bytes):
            part = grad[:, :, band]
            if grad_x is not None:
                grad_x += part @ _compose(offsets, weight, vectors, band).to(x.dtype)
            if grad_offsets is not None:
                grad_offsets += (part.mT @ x).flatten(1).to(vectors.dtype) @ vectors[:, band].flatten(1).T
        return grad_x, grad_offsets, None, None, None
