"""Merges by singular values do what their papers say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wemoe_plugin.merging.spectral import isotropic_merge, task_singular_vectors_merge


def vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_isotropic_keeps_the_directions_of_the_sum_and_its_mean_singular_value(shape: tuple[int, int]) -> None:
    tau = vectors(3, *shape)
    merged = isotropic_merge(tau)
    before, after = torch.linalg.svdvals(tau.sum(0)), torch.linalg.svdvals(merged)
    torch.testing.assert_close(after, before.mean().expand(6))
    left, _, right = torch.linalg.svd(tau.sum(0), full_matrices=False)
    torch.testing.assert_close(merged, before.mean() * left @ right)


def test_isotropic_adds_nothing_where_no_expert_changed_anything() -> None:
    tau = torch.zeros(3, 6, 6, dtype=torch.float64)
    assert torch.equal(isotropic_merge(tau), tau[0])
    tau[:, :, 0] = 1.0
    merged = isotropic_merge(tau)
    torch.testing.assert_close(merged[:, 1:], torch.zeros(6, 5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.linalg.svdvals(merged)[0], torch.linalg.svdvals(tau.sum(0)).mean())


def test_experts_that_share_no_direction_are_kept_apart_by_task_singular_vectors() -> None:
    """With orthogonal subspaces of small rank, nothing is lost: the merge is the sum of the task vectors."""
    left, right = torch.linalg.qr(vectors(8, 8))[0], torch.linalg.qr(vectors(1, 9, 9)[0])[0]
    tau = torch.stack([left[:, k * 2 : k * 2 + 2] @ right[k * 2 : k * 2 + 2] for k in range(4)])
    torch.testing.assert_close(task_singular_vectors_merge(tau), tau.sum(0))


def test_equal_experts_count_once_for_task_singular_vectors() -> None:
    """Singular vectors that coincide are shared between the experts, where task arithmetic would double them."""
    one = torch.outer(vectors(6), vectors(9))
    merged = task_singular_vectors_merge(torch.stack([one, one]))
    torch.testing.assert_close(merged, one)


@pytest.mark.parametrize("merge", [isotropic_merge, task_singular_vectors_merge])
@pytest.mark.parametrize("shape", [(5,), (4, 3, 2, 2), ()])
def test_everything_but_matrices_is_averaged(merge, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    tau = vectors(3, *shape)
    torch.testing.assert_close(merge(tau), tau.mean(0))
