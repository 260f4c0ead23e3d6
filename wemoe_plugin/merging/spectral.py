"""Static merges that look at the singular values of task vectors.

Matrices are merged by their spectrum; everything else (biases, norms, convolutions) by the mean of the task vectors, as
in the published programs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def isotropic_merge(vectors: Float[Tensor, "experts ..."]) -> Float[Tensor, ...]:
    """Iso-C: the sum of the task vectors with all its singular values replaced by their mean.

    For U Σ Vᵀ = Σₖ τₖ the result is σ̄ U Vᵀ. Directions without any weight (σ below rounding) stay at zero.

    Source: "No Task Left Behind", arXiv 2502.04959, section 4.1.
    """
    if vectors.ndim != 3:
        return vectors.mean(0)
    left, values, right = torch.linalg.svd(vectors.sum(0), full_matrices=False)
    merged: Tensor = values.mean() * (_present(left, values) @ right)
    return merged


def task_singular_vectors_merge(vectors: Float[Tensor, "experts ..."]) -> Float[Tensor, ...]:
    """TSV-M: the leading singular vectors of every expert, made orthogonal to those of the others.

    Of every τₖ = Uₖ Σₖ Vₖᵀ the first min(out, in) / K singular triplets are kept. The Uₖ side by side are replaced by
    the orthonormal matrix nearest to them (their polar factor), the Vₖ likewise; the result is U⊥ Σ V⊥ᵀ.

    Source: "Task Singular Vectors", arXiv 2412.00081, section 4.2 and algorithm 1.
    """
    if vectors.ndim != 3:
        return vectors.mean(0)
    kept = max(1, min(vectors.shape[1:]) // vectors.shape[0])
    left, values, right = torch.linalg.svd(vectors, full_matrices=False)
    side_by_side = torch.cat(list(left[:, :, :kept]), dim=1)
    stacked = torch.cat(list(right[:, :kept]), dim=0)
    merged: Tensor = (_orthonormal(side_by_side) * values[:, :kept].reshape(-1)) @ _orthonormal(stacked)
    return merged


def _orthonormal(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The polar factor: the matrix with all singular values set to one."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = _present(left, values) @ right
    return nearest


def _present(left: Float[Tensor, "rows rank"], values: Float[Tensor, " rank"]) -> Float[Tensor, "rows rank"]:
    """Singular vectors, those set to zero whose singular value is nothing but rounding."""
    smallest = values[:1] * left.shape[0] * torch.finfo(values.dtype).eps
    return left * (values > smallest)
