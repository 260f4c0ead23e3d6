"""Truncated SVD of all MLP task vectors of several experts: seconds, and the error against the optimal one's.

    python benchmarks/svd_speed.py [--width 768 --hidden 3072 --layers 12 --experts 8 --rank 16 --threads 2]

Wanted for the defaults, the MLPs of eight ViT-B/32: under 20 s on two cores, errors of at most 1.01 of the optimum's.

Each thread makes its random task vectors one after the other and decomposes each at once, so as many lie in memory as
there are threads. Making them is timed apart and left out: the seconds are those that the threads spent in the
decompositions, divided by the threads; while one makes a matrix, the others go on. The first matrix of each thread
warms up and is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from machine import describe_machine
from torch import Tensor

from wemoe_plugin.task_vectors.low_rank import _by_gram, singular_values, truncated_svd

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "all equal": torch.ones_like,
    "a step from 1 to 0.9": lambda k: torch.where(k <= len(k) // 12, 1.0, 0.9),
    "power law k^-0.25": lambda k: k**-0.25,
    "power law k^-0.5": lambda k: k**-0.5,
    "power law k^-1": lambda k: k**-1.0,
    "power law k^-2": lambda k: k**-2.0,
    "exponential exp(-k/100)": lambda k: torch.exp(-k / 100),
    "exponential exp(-k/30)": lambda k: torch.exp(-k / 30),
    "exponential exp(-k/10)": lambda k: torch.exp(-k / 10),
}


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def work_through(shapes: list[tuple[int, int]], rank: int, seed: int) -> tuple[float, float]:
    """Seconds that one thread spends in decompositions and in making their inputs."""
    generator = torch.Generator().manual_seed(seed)
    decomposing = making = 0.0
    truncated_svd(torch.randn(shapes[0], generator=generator), rank)
    for shape in shapes:
        started = time.perf_counter()
        vector = torch.randn(shape, generator=generator)
        made = time.perf_counter()
        truncated_svd(vector, rank)
        decomposing += time.perf_counter() - made
        making += made - started
    return decomposing, making


def known_matrices(rows: int, columns: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, τ, its singular values) in float64."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    yield "Gaussian noise", noise, torch.linalg.svdvals(noise)
    shorter = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(side, shorter, generator=generator, dtype=torch.float64)).Q
        for side in (rows, columns)
    )
    k = torch.arange(1, shorter + 1, dtype=torch.float64)
    for name, spectrum in SPECTRA.items():
        sigma = spectrum(k)
        yield name, (left * sigma) @ right.T, sigma


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"width": 768, "hidden": 3072, "layers": 12, "experts": 8, "rank": 16, "threads": 2, "repeats": 3}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, hidden, rank = options.width, options.hidden, options.rank
    shapes = [(hidden, width), (width, hidden)] * (options.layers * options.experts)
    print(describe_machine(options.threads))
    print(f"{len(shapes)} matrices of {hidden} x {width} and {width} x {hidden}, float32, rank {rank}\n")

    shares = [shapes[thread :: options.threads] for thread in range(options.threads)]
    with ThreadPoolExecutor(options.threads) as threads:
        seconds = list(threads.map(lambda pair: work_through(pair[1], rank, pair[0]), enumerate(shares)))
    decomposing, making = (sum(column) / options.threads for column in zip(*seconds, strict=True))
    print(f"all decompositions: {decomposing:.1f} s (making the inputs, left out: {making:.1f} s)\n")

    matrix = torch.randn(hidden, width, generator=torch.Generator().manual_seed(0))
    variants: dict[str, Callable[[], object]] = {
        "truncated_svd": lambda: truncated_svd(matrix, rank),
        "by the Gram matrix, same rank": lambda: _by_gram(matrix.double(), rank),
        "singular_values": lambda: singular_values(matrix),
        "torch.linalg.svd": lambda: torch.linalg.svd(matrix, full_matrices=False),
    }
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.repeats + 1):
        for name, run in variants.items():
            taken[name].append(timed(run))
    medians = {name: statistics.median(values[1:]) for name, values in taken.items()}
    print(f"one matrix of {hidden} x {width}, one thread; medians of {options.repeats} alternating runs")
    print(f"{'':<40}{'ms':>9}{'/ truncated_svd':>17}")
    for name, median in medians.items():
        print(f"{name:<40}{1000 * median:>9.1f}{median / medians['truncated_svd']:>16.1f}x")

    ranks = sorted({1, rank, 4 * rank})
    print(f"\nerror of truncated_svd / error of the optimal truncation\n{'':<40}", end="")
    print(*(f"{f'rank {each}':>12}" for each in ranks), sep="")
    worst = 0.0
    for rows, columns in dict.fromkeys(shapes):
        for name, known, sigma in known_matrices(rows, columns):
            ratios = []
            for each in ranks:
                down, up = truncated_svd(known, each)
                error = torch.linalg.norm(known - up.double().T @ down.double())
                ratios.append(float(error / torch.linalg.norm(sigma[each:])))
            worst = max(worst, *ratios)
            print(f"{f'{rows} x {columns}, {name}':<40}", *(f"{ratio:>12.6f}" for ratio in ratios), sep="")
    print(f"worst: {worst:.4f}")


if __name__ == "__main__":
    main()
