"""How large a band of composed weights should be: the two layers of an upscaled MLP at several band sizes.

    python benchmarks/band_size.py

Prints medians of alternating runs and their ratio to the plain layers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import describe_machine
from torch import Tensor

from wemoe_plugin.modeling.composition import apply_dense

BATCH, TOKENS, WIDTH, HIDDEN, EXPERTS, REPEATS = 16, 50, 768, 3072, 8, 9


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    layers = [
        (torch.randn(BATCH, TOKENS, i), torch.randn(1 + EXPERTS, o, i)) for i, o in ((WIDTH, HIDDEN), (HIDDEN, WIDTH))
    ]
    offsets = torch.randn(BATCH, EXPERTS)

    def banded(megabytes: int) -> Callable[[], list[Tensor]]:
        return lambda: [apply_dense(x, offsets, stack, megabytes << 20) for x, stack in layers]

    variants: dict[str, Callable[[], list[Tensor]]] = {"plain": lambda: [F.linear(x, stack[0]) for x, stack in layers]}
    variants |= {f"{megabytes} MiB": banded(megabytes) for megabytes in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            for name, run in variants.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(describe_machine(2))
    print(f"{'band':<10}{'ms':>8}{'/ plain':>10}")
    for name, median in medians.items():
        print(f"{name:<10}{1000 * median:>8.1f}{median / medians['plain']:>9.2f}x")


if __name__ == "__main__":
    main()
