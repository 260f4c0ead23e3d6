"""Compress a task vector to a product of two thin matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def truncated_svd(
    vector: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """The best approximation of a matrix by one of a given rank, in PEFT's orientation with the scaling in B.

    Projects onto the leading eigenvectors of the smaller Gram matrix, computed in float64: for the shapes of MLPs
    several times faster than a full decomposition and, the spectrum of a Gram matrix being squared, still exact to
    about the square root of float64's precision.

    Args:
        vector: τ, (out, in).
        rank: at most min(out, in).

    Returns:
        A (rank, in) and B (out, rank) in float32 with B A ≈ τ.
    """
    exact = vector.to(torch.float64)
    wide = exact.shape[0] <= exact.shape[1]
    gram = exact @ exact.T if wide else exact.T @ exact
    leading = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)
    if wide:
        down, up = leading.T @ exact, leading
    else:
        down, up = leading.T, exact @ leading
    return down.to(torch.float32), up.to(torch.float32)
