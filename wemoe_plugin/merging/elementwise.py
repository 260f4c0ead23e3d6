"""The arithmetic of static merges and task vectors, on any matching ranges of elements.

Every function is elementwise and every result is the same whatever the ranges are: products and sums are separate
operations, since a fused multiply-add would round differently at the ends of a range.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from wemoe_plugin.merging.operations import Mixture


def mix(mixture: Mixture, base: Tensor | None, inputs: Iterable[Tensor]) -> Tensor:
    """θ₀ + λ (Σₖ wₖ (θₖ − θ₀)) / divisor, or without a base λ (Σₖ wₖ θₖ) / divisor.

    Args:
        mixture: the coefficients; its tensors are not looked at.
        base: θ₀, (n,), or None.
        inputs: θₖ, each (n,) and of the base's dtype; taken one at a time.

    Returns:
        θ, (n,). Source: task arithmetic, arXiv 2212.04089, section 2; the order of operations is mergekit's.
    """
    vectors = inputs if base is None else task_vectors(base, inputs)
    total: Tensor | None = None
    for vector, weight in zip(vectors, mixture.weights, strict=True):
        scaled = vector * weight
        total = scaled if total is None else total.add_(scaled)
    assert total is not None, "a mixture has at least one input"
    if mixture.divisor != 1.0:
        total.div_(mixture.divisor)
    if mixture.scale != 1.0:
        total.mul_(mixture.scale)
    return total if base is None else total.add_(base)


def task_vectors(base: Tensor, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """τₖ = θₖ − θ₀ of each input, one at a time."""
    for tensor in inputs:
        yield tensor - base
