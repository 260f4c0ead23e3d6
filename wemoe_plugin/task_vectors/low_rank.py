"""Compress a task vector to a product of two thin matrices, and take such products apart.

Factors are stored as rows: ``down`` (rank, in) has orthonormal rows, ``up`` (rank, out) carries the scaling, both run
from the largest singular value to the smallest, and τ ≈ upᵀ down. Their first r rows are the best approximation of
rank r. PEFT's A is ``down`` and its B is ``upᵀ``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from wemoe_plugin.task_vectors.sampling import sample_size

# Chosen with benchmarks/svd_speed.py: the worst error is then 1.003 of the optimum's at the ranks that iterate.
ITERATIONS = 8


def truncated_svd(
    vector: Float[Tensor, "out in"], rank: int
) -> tuple[Float32[Tensor, "rank in"], Float32[Tensor, "rank out"]]:
    """The best approximation of a matrix by one of a given rank, or one whose error is hardly larger.

    Where the smaller side is short or the rank a large part of it, this projects onto the leading eigenvectors of the
    smaller Gram matrix, in float64. Elsewhere it projects onto a subspace found by iteration from a random start, in
    float32, many times faster; the start is always the same, so the result is too. The Frobenius norm of the error
    is then within 1 % of the optimum, or the rounding of float32 (about 4e-7 of that of τ) where that is larger.

    Args:
        vector: τ, (out, in), finite.
        rank: from 1 to min(out, in).

    Returns:
        ``down`` (rank, in), its rows orthonormal, and ``up`` (rank, out), its rows of descending length, with
        upᵀ down ≈ τ, on the device of τ. Rows of ``up`` beyond the rank of τ are zero up to rounding.

    Raises:
        torch.linalg.LinAlgError: τ is not finite, or its squares are too large for float64.

    Source: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    sample = sample_size((vector.shape[0], vector.shape[1]), rank)
    _take_up_thread_count()
    if sample is None:
        down, up = _by_gram(vector.to(torch.float64), rank)
    else:
        down, up = _by_iteration(vector.to(torch.float32), rank, sample)
    rows = torch.contiguous_format
    return down.to(torch.float32, memory_format=rows), up.to(torch.float32, memory_format=rows)


def singular_values(vector: Float[Tensor, "out in"]) -> Float64[Tensor, " shorter"]:
    """All singular values of a matrix, descending, from the smaller Gram matrix in float64.

    Those below about 1e-8 of the largest are rounding.

    Args:
        vector: τ, (out, in), finite.

    Returns:
        σ, (min(out, in),).

    Raises:
        torch.linalg.LinAlgError: τ is not finite, or its squares are too large for float64.
    """
    _take_up_thread_count()
    exact = vector.to(torch.float64)
    gram = exact @ exact.T if exact.shape[0] <= exact.shape[1] else exact.T @ exact
    values: Tensor = torch.linalg.eigvalsh(_finite(gram))
    return values.clamp_(min=0.0).sqrt_().flip(-1)


def truncated_product(
    down: Float[Tensor, "r in"], up: Float[Tensor, "r out"], rank: int
) -> tuple[Float[Tensor, "kept in"], Float[Tensor, "kept out"]]:
    """The best approximation of upᵀ down by a product of a given rank, without that matrix itself.

    Args:
        down: (r, in), any rows, finite.
        up: (r, out), any rows, finite.
        rank: from 1 to min(out, in).

    Returns:
        ``down`` (rank, in) and ``up`` (rank, out) as from :func:`truncated_svd`, or the two factors as they are where
        they have no more rows than ``rank``.

    Raises:
        torch.linalg.LinAlgError: a factor is not finite.
    """
    if rank >= down.shape[0]:
        return down, up
    (right, left), core = _bases_and_core(down, up)
    u, sigma, vt = torch.linalg.svd(core, full_matrices=False)
    thin_down = vt[:rank] @ right.T
    thin_up = (u[:, :rank] * sigma[:rank]).T @ left.T
    return thin_down.to(torch.float32), thin_up.to(torch.float32)


def singular_values_of_product(down: Float[Tensor, "r in"], up: Float[Tensor, "r out"]) -> Float64[Tensor, " values"]:
    """The singular values of upᵀ down that can be other than zero, descending, without that matrix itself.

    Args:
        down: (r, in), any rows, finite.
        up: (r, out), any rows, finite.

    Returns:
        σ, (min(r, out, in),).

    Raises:
        torch.linalg.LinAlgError: a factor is not finite.
    """
    values: Tensor = torch.linalg.svdvals(_bases_and_core(down, up)[1])
    return values


def _by_gram(exact: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if exact.shape[0] > exact.shape[1]:
        leading = _leading_eigenvectors(exact.T @ exact, rank)
        return leading.T, (exact @ leading).T
    leading = _leading_eigenvectors(exact @ exact.T, rank)
    # The rows of leadingᵀ τ are orthogonal, but some may be zero: a QR leaves every row of ``down`` of length 1.
    basis, lengths = torch.linalg.qr(exact.T @ leading)
    return basis.T, lengths @ leading.T


def _by_iteration(vector: Tensor, rank: int, sample: int) -> tuple[Tensor, Tensor]:
    # Its own generator, on the CPU: the same start on every device, in every thread, whatever was drawn before.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(vector.shape[0], sample, generator=generator, dtype=torch.float32).to(vector.device)
    basis = torch.linalg.qr(vector.T @ start).Q
    for _ in range(ITERATIONS):
        # Without a QR after each product, float32 loses all directions below 3e-4 of the first.
        basis = torch.linalg.qr(vector @ basis).Q
        basis = torch.linalg.qr(vector.T @ basis).Q
    image = (vector @ basis).to(torch.float64)
    leading = _leading_eigenvectors(image.T @ image, rank)
    return (basis.to(torch.float64) @ leading).T, (image @ leading).T


def _leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Those of the ``rank`` largest eigenvalues as columns, the largest first."""
    ascending: Tensor = torch.linalg.eigh(_finite(gram)).eigenvectors
    return ascending[:, -rank:].flip(-1)


def _bases_and_core(down: Tensor, up: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Orthonormal bases of the rows of both factors, and what upᵀ down is between them."""
    _take_up_thread_count()
    right, lower = torch.linalg.qr(down.to(torch.float64).T)
    left, upper = torch.linalg.qr(up.to(torch.float64).T)
    return (right, left), _finite(upper @ lower.T)


def _finite(matrix: Tensor) -> Tensor:
    # Of some sizes torch refuses such matrices, of others it returns NaN.
    if not matrix.isfinite().all():
        message = "a matrix that is not finite has no singular values"
        raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined]
    return matrix


def _take_up_thread_count() -> None:
    """Hold LAPACK to ``torch.set_num_threads`` in this thread too.

    A thread takes up that setting when it first runs something of torch's in parallel. Before that, LAPACK uses all
    cores, and the first decomposition of every thread would differ from the others in rounding.
    """
    torch.get_num_threads()


def product_norm(down: Float[Tensor, "rank in"], up: Float[Tensor, "rank out"]) -> Float64[Tensor, ""]:
    """‖upᵀ down‖ (Frobenius), a scalar, without that matrix itself."""
    first, second = down.to(torch.float64), up.to(torch.float64)
    return ((first @ first.T) * (second @ second.T)).sum().clamp_min(0.0).sqrt()
