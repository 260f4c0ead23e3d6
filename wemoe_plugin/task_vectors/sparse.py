"""Compress a task vector to its entries of largest magnitude."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor


def largest(vector: Float[Tensor, "out in"], count: int) -> tuple[Float[Tensor, " count"], Int32[Tensor, " count"]]:
    """The entries of largest magnitude of a matrix, with where they are.

    Of entries that tie for the last places, those with the lower indices are taken, so the result is the same on
    every device and for every number of threads.

    Args:
        vector: τ, (out, in), without NaN, of fewer than 2³¹ elements.
        count: from 1 to out · in.

    Returns:
        values (count,) in the dtype of τ, and indices (count,) into the row-major matrix, ascending.

    Raises:
        ValueError: the matrix has too many elements for indices of 32 bits, or holds NaN.
    """
    if vector.numel() >= 2**31:
        raise ValueError(f"a matrix of {tuple(vector.shape)} has too many elements for indices of 32 bits")
    flat = vector.reshape(-1)
    magnitudes = flat.abs()
    # The indices of topk are arbitrary among ties, its values are not.
    least = magnitudes.topk(count, sorted=False).values.min()
    if least.isnan():  # topk puts NaN above all else
        raise ValueError("the entries of largest magnitude of a matrix that holds NaN are not defined")
    kept = magnitudes > least
    tied = (magnitudes == least).nonzero().squeeze(1)
    kept[tied[: count - int(kept.sum())]] = True
    indices = kept.nonzero().squeeze(1)
    return flat[indices], indices.to(torch.int32)
