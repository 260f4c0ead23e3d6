"""Watch what the routers decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def routing_means(routers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[float]]]:
    """Collect the mean output of modules during some forward passes.

    Args:
        routers: each gives weights (batch, experts) or (batch, tokens, experts); named by the module it routes.

    Yields:
        A dictionary that holds the mean over all samples (and tokens), one number per expert, once the context ends.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(routers, 0)
    means: dict[str, list[float]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, weights: Tensor) -> None:
            each = weights.detach().double().flatten(0, -2)
            sums[name] = sums[name] + each.sum(0) if name in sums else each.sum(0)
            counts[name] += len(each)

        return hook

    handles = [router.register_forward_hook(watch(name)) for name, router in routers.items()]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()
        means |= {name: (total / counts[name]).tolist() for name, total in sums.items()}
