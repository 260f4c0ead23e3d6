"""Which rank each task vector is kept at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of a share of Σ σ². Sums of thousands of squares, and singular values from a Gram matrix, are no more exact.
PRECISION = 1e-12


def rank_for_energy(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps a share of the squared Frobenius norm.

    Args:
        values: the singular values σ of one matrix, (n,), descending, n ≥ 1.
        energy: the share of Σ σ², in (0, 1]. A shortfall of a part in 10¹² is taken for rounding.

    Returns:
        The smallest r ≥ 1 with σ₁² + … + σᵣ² ≥ energy · Σ σ²; 1 where all σ are zero.
    """
    kept = values.to(torch.float64).square().cumsum(0)
    wanted = energy * (1.0 - PRECISION) * kept[-1]
    return int(torch.searchsorted(kept, wanted)) + 1


def allot_ranks(spectra: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[int]:
    """Ranks of several matrices that share a budget of parameters.

    Every matrix gets rank 1. Then the singular value with the largest σ² per parameter among all next ones is taken,
    over and over; a matrix whose next rank no longer fits is left at its rank while cheaper ones go on. Singular
    values of zero are never taken. Of equal gains the earlier matrix's comes first.

    Up to the first value that does not fit, no other choice of ranks keeps more of Σ σ² with as many parameters; with
    all costs equal, none does within the budget.

    Args:
        spectra: the singular values of each matrix, (nᵢ,) each, descending, nᵢ ≥ 1.
        costs: the parameters that one rank of each matrix takes, out + in; positive.
        budget: parameters in all.

    Returns:
        The rank of each matrix, from 1 to nᵢ.

    Raises:
        ValueError: the budget is smaller than rank 1 everywhere takes.
    """
    least = sum(costs)
    if least > budget:
        raise ValueError(f"a budget of {budget} parameters is too small: rank 1 for every matrix takes {least}")
    if not spectra:
        return []
    tails = [spectrum[1:].to("cpu", torch.float64) for spectrum in spectra]
    lengths = torch.tensor([len(tail) for tail in tails])
    owners = torch.arange(len(spectra)).repeat_interleave(lengths)
    prices = torch.tensor(costs, dtype=torch.int64)
    sigma = torch.cat(tails)
    owners, sigma = owners[sigma > 0.0], sigma[sigma > 0.0]
    # Stable, and descending within a matrix before: the ranks of one matrix stay in order even where gains are equal.
    owners = owners[(sigma.square() / prices[owners]).argsort(descending=True, stable=True)]
    ranks, left = torch.ones(len(spectra), dtype=torch.int64), budget - least
    while len(owners):
        spent = prices[owners].cumsum(0)
        fitting = int(torch.searchsorted(spent, left, right=True))
        if fitting:
            ranks += owners[:fitting].bincount(minlength=len(spectra))
            left -= int(spent[fitting - 1])
        owners = owners[fitting:]
        # The first that did not fit goes, and with it all that cost as much: at most one turn per price.
        owners = owners[prices[owners] <= left]
    return [int(rank) for rank in ranks]
