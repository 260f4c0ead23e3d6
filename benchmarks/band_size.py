"""How many output rows a CPU should compose at least, and for how many samples: the two layers of upscaled MLPs.

    python benchmarks/band_size.py

For the MLPs of ViT-B/32, ViT-B/16 and ViT-L/14, eight experts and batch 16: forward, and forward and backward, at
several bounds, as a ratio to the plain layers' forward. A bound of one row leaves it to the size of the cache alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from machine import describe_machine
from rounds import time_rounds
from torch import Tensor

from wemoe_plugin.modeling import composition

SHAPES = {"ViT-B/32": (768, 3072, 50), "ViT-B/16": (768, 3072, 197), "ViT-L/14": (1024, 4096, 257)}
BATCH, EXPERTS, REPEATS = 16, 8, 7
ROWS, GROUPS = (1, 32, 64, 96, 192), (8, 16)

Layer = tuple[Tensor, Tensor, Tensor]
"""Input, stack of weight and task vectors, and the gradient of the output."""


def layers(width: int, hidden: int, tokens: int) -> list[Layer]:
    """Both layers of an MLP."""
    return [
        (
            torch.randn(BATCH, tokens, i, requires_grad=True),
            torch.randn(1 + EXPERTS, o, i),
            torch.randn(BATCH, tokens, o),
        )
        for i, o in ((width, hidden), (hidden, width))
    ]


def plain(mlp: list[Layer]) -> None:
    """The static weights alone."""
    with torch.no_grad():
        for x, stack, _ in mlp:
            F.linear(x, stack[0])


def composed(mlp: list[Layer], offsets: Tensor, backward: bool, rows: int, group: int) -> None:
    """With task vectors, at these bounds."""
    composition._FAST_ROWS, composition._GROUP = rows, group
    with torch.set_grad_enabled(backward):
        for x, stack, slope in mlp:
            y = composition.apply_dense(x, offsets, stack)
            if backward:
                torch.autograd.grad(y, [x, offsets], slope)


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(describe_machine(2))
    offsets = torch.randn(BATCH, EXPERTS, requires_grad=True)
    for name, shape in SHAPES.items():
        mlp = layers(*shape)
        bounds = list(itertools.product(ROWS, GROUPS))
        variants: dict[str, Callable[[], object]] = {"plain": partial(plain, mlp)}
        for (rows, group), backward in itertools.product(bounds, (False, True)):
            variants[f"{rows}, {group}, {backward}"] = partial(composed, mlp, offsets, backward, rows, group)
        timings = time_rounds(variants, REPEATS)
        print(f"\n{name}; rounds undisturbed: {timings.quiet} of {timings.rounds}")
        print(f"{'rows at least':>14}{'samples':>9}{'forward':>10}{'and backward':>14}")
        for rows, group in bounds:
            forward, both = (
                timings.seconds[f"{rows}, {group}, {backward}"] / timings.seconds["plain"] for backward in (False, True)
            )
            print(f"{rows:>14}{group:>9}{forward:>9.2f}x{both:>13.2f}x", flush=True)


if __name__ == "__main__":
    main()
