"""y_b = x_b (W + Σₖ o_bk τₖ)ᵀ for a whole batch: each sample with its own weights, none of them kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

WORKING_BYTES = 256 * 2**20
"""The most that the composed weights of one layer take at a time, unless told otherwise."""

_CACHE_BYTES = 6 * 2**20
"""What a CPU composes at a time, however much it may: a tile that stays in the cache is faster than a large one, if it
has rows enough."""

_FAST_ROWS = 96
"""Output rows that a CPU composes at least, in the cache or not: products with fewer are slower (benchmarks/LOG.md)."""

_GROUP = 16
"""Samples that a CPU composes at a time: with more, a tile would be too narrow for fast products or leave the cache."""

_EVEN_ROWS = 16
"""Bands have a multiple of so many output rows: products of odd sizes are slower by a sixth."""


class SparseVectors(NamedTuple):
    """The largest entries of task vectors.

    Attributes:
        values: (experts, count).
        indices: where they stand in the row-major (out, in) matrix, ascending, (experts, count).
        starts: how many entries of each expert lie above each output row, (experts, out + 1), on the CPU.
    """

    values: Float[Tensor, "experts count"]
    indices: Int[Tensor, "experts count"]
    starts: Int[Tensor, "experts out_plus_1"]


def apply_dense(
    x: Float[Tensor, "batch tokens in"],
    offsets: Float[Tensor, "batch experts"],
    stack: Float[Tensor, "experts_plus_1 out in"],
    biases: Float[Tensor, "each out"] | None = None,
    working_bytes: int = WORKING_BYTES,
) -> Float[Tensor, "batch tokens out"]:
    """Apply a static weight and dense task vectors, stacked: the weight first.

    Composes the weights of some samples for a band of output rows with one product, uses them, and goes on, so memory
    is bounded whatever the batch. Differentiable in ``x`` and ``offsets`` only: weights and task vectors are frozen.
    The backward pass composes the weights again instead of keeping them. Offsets that are one row expanded over the
    batch (a router of depth 0) are composed once. Under autocast the products are taken in its dtype, as those of a
    Linear layer are; weights are composed in their own.

    Args:
        x: the layer's input.
        offsets: one per sample and expert.
        stack: the weight and its task vectors.
        biases: each sample's, or one for all.
        working_bytes: the most that is composed at a time.
    """
    return _apply(x, offsets, stack, None, biases, working_bytes)


def apply_sparse(
    x: Float[Tensor, "batch tokens in"],
    offsets: Float[Tensor, "batch experts"],
    weight: Float[Tensor, "out in"],
    vectors: SparseVectors,
    biases: Float[Tensor, "each out"] | None = None,
    working_bytes: int = WORKING_BYTES,
) -> Float[Tensor, "batch tokens out"]:
    """The same with sparse task vectors, which are spread out for one band of output rows at a time."""
    return _apply(x, offsets, weight, vectors, biases, working_bytes)


def apply_low_rank(
    x: Float[Tensor, "batch tokens in"],
    offsets: Float[Tensor, "batch *tokens experts"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    down: Float[Tensor, "ranks in"],
    up: Float[Tensor, "ranks_and_biases out"],
    owners: Int[Tensor, " ranks"],
) -> Float[Tensor, "batch tokens out"]:
    """x Wᵀ + ((x downᵀ) ⊙ offsets) up: two thin products with the factors of all experts stacked, no weight composed.

    Args:
        x: the layer's input.
        offsets: one per sample and expert, or one per token and expert.
        weight: the static weight.
        bias: the static bias.
        down: first factors, those of the first expert first.
        up: second factors; if biases move too, their task vectors are its last rows, one per expert.
        owners: which expert each rank belongs to.
    """
    if offsets.ndim == 2:
        offsets = offsets.unsqueeze(1)
    thin = F.linear(x, down)
    thin = thin * offsets[..., owners].to(thin.dtype)
    if up.shape[0] > down.shape[0]:
        thin = torch.cat([thin, offsets.expand(-1, x.shape[1], -1).to(thin.dtype)], dim=-1)
    # In place, and as a matrix until the end: a sum of its own, or the gradient of a view, would take memory and time.
    y = F.linear(x.flatten(0, 1), weight, bias)
    y.addmm_(thin.flatten(0, 1).to(y.dtype), up.to(y.dtype))
    return y.view(*x.shape[:2], len(weight))


def _apply(
    x: Tensor,
    offsets: Tensor,
    source: Tensor,
    vectors: SparseVectors | None,
    biases: Tensor | None,
    working_bytes: int,
) -> Tensor:
    batch, tokens, width = x.shape
    if batch > 1 and offsets.stride(0) == 0:
        x, offsets = x.reshape(1, batch * tokens, width), offsets[:1]
        biases = None if biases is None else biases[:1]
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and x.dtype != torch.float64:  # which autocast leaves alone
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():
        y: Tensor = _Composition.apply(x, offsets.to(source.dtype), source, vectors, working_bytes)
        if biases is not None:
            y.add_(biases.unsqueeze(1).to(y.dtype))  # in place: a sum beside y would double its memory
    return y.view(batch, tokens, source.shape[-2])


class _Composition(torch.autograd.Function):
    """``source`` is the stack of weight and dense task vectors, or the weight alone beside sparse ones."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offsets: Tensor, source: Tensor, vectors: SparseVectors | None, working_bytes: int
    ) -> Tensor:
        ctx.save_for_backward(x, offsets)
        ctx.source, ctx.vectors, ctx.working_bytes = source, vectors, working_bytes
        coefficients = _with_static(offsets)
        y = x.new_empty(*x.shape[:2], source.shape[-2])
        tile = _Tile(source, x)
        for band, tiles in _bands(x, source, vectors, working_bytes):
            stacked = _stacked(source, vectors, band)
            for rows in tiles:
                y[rows, :, band] = x[rows] @ tile.composed(coefficients[rows], stacked).mT
            del stacked  # of this band, before the next one's is made
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if torch.is_grad_enabled():  # under create_graph only
            raise NotImplementedError("dense and sparse task vectors have no second derivatives; use low_rank")
        x, offsets = ctx.saved_tensors
        wants_x, wants_offsets = ctx.needs_input_grad[:2]
        coefficients = _with_static(offsets)
        grad_x = torch.zeros_like(x) if wants_x else None
        exact = torch.promote_types(coefficients.dtype, torch.float32)  # bands are many: not summed in half precision
        grad_coefficients = torch.zeros_like(coefficients, dtype=exact) if wants_offsets else None
        tile = _Tile(ctx.source, x)
        for band, tiles in _bands(x, ctx.source, ctx.vectors, ctx.working_bytes):
            stacked = _stacked(ctx.source, ctx.vectors, band)
            for rows in tiles:
                part = grad[rows, :, band]
                if grad_x is not None:
                    grad_x[rows].baddbmm_(part, tile.composed(coefficients[rows], stacked))
                if grad_coefficients is not None:
                    grad_coefficients[rows] += tile.outer(part, x[rows]) @ stacked.T
            del stacked
        grad_offsets = None if grad_coefficients is None else grad_coefficients[:, 1:].to(coefficients.dtype)
        return grad_x, grad_offsets, None, None, None


def _with_static(offsets: Tensor) -> Tensor:
    """With a one for the static weight, so that composing is one product: (batch, 1 + experts)."""
    return torch.cat([offsets.new_ones(offsets.shape[0], 1), offsets], dim=1)


def _bands(
    x: Tensor, source: Tensor, vectors: SparseVectors | None, working_bytes: int
) -> Iterator[tuple[slice, list[slice]]]:
    """Bands of output rows and, for each, groups of samples: what is composed at once stays within bounds."""
    batch, tokens, columns = x.shape
    rows, width = source.shape[-2], source.element_size()
    composed = columns * (width if x.dtype == source.dtype else width + x.element_size())
    spread = 0
    if vectors is not None:  # written out, and one expert's places as int64, twice
        spread = (1 + len(vectors.values)) * columns * width + 16 * vectors.values.shape[1] // rows

    def row_bytes(samples: int) -> int:
        return samples * (composed + tokens * x.element_size()) + spread

    limit, group = working_bytes, batch
    if x.device.type == "cpu":
        group = min(batch, _GROUP)
        limit = min(limit, max(_CACHE_BYTES, _FAST_ROWS * row_bytes(group)))
    while row_bytes(group) > limit and group > 1:
        group = -(-group // 2)
    step = max(1, min(rows, limit // max(row_bytes(group), 1)))
    if step > _EVEN_ROWS:
        step = step // _EVEN_ROWS * _EVEN_ROWS
    tiles = [slice(start, min(start + group, batch)) for start in range(0, batch, max(group, 1))]
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows)), tiles


def _stacked(source: Tensor, vectors: SparseVectors | None, band: slice) -> Tensor:
    """Static weight and task vectors of a band of output rows, (1 + experts, band · in)."""
    if vectors is None:
        return source[:, band].flatten(1)
    own = source[band].flatten()
    stacked = own.new_zeros(1 + len(vectors.values), len(own))
    stacked[0] = own
    before = band.start * source.shape[1]
    for k, starts in enumerate(vectors.starts):
        first, last = int(starts[band.start]), int(starts[band.stop])
        stacked[k + 1, vectors.indices[k, first:last].long() - before] = vectors.values[k, first:last]
    return stacked


class _Tile:
    """What is composed at a time, each written over the last: fresh pages cost more than the products."""

    def __init__(self, source: Tensor, x: Tensor) -> None:
        self._memory, self._like = source.new_empty(0), x

    def composed(self, coefficients: Tensor, stacked: Tensor) -> Tensor:
        """The weights (batch, band, in) of some samples for a band of output rows, in the input's dtype."""
        flat = self._take(coefficients.shape[0], stacked.shape[1])
        torch.mm(coefficients.detach(), stacked, out=flat)  # detached: torch.export traces this with gradients on
        return flat.view(flat.shape[0], -1, self._like.shape[2]).to(self._like.dtype)

    def outer(self, grad: Tensor, x: Tensor) -> Tensor:
        """gᵀx of some samples, (batch, band · in), in the weights' dtype: the gradient of what is composed for them."""
        flat = self._take(x.shape[0], grad.shape[2] * x.shape[2])
        if flat.dtype != x.dtype:
            return flat.copy_((grad.mT @ x).flatten(1))
        torch.bmm(grad.mT, x, out=flat.view(x.shape[0], grad.shape[2], x.shape[2]))
        return flat

    def _take(self, rows: int, columns: int) -> Tensor:
        if self._memory.numel() < rows * columns:
            self._memory = self._memory.new_empty(rows * columns)
        return self._memory[: rows * columns].view(rows, columns)
