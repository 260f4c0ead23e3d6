"""Ranks keep the energy asked for, and a shared budget goes where it keeps most."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from wemoe_plugin.task_vectors.ranks import allot_ranks, rank_for_energy

# Whole numbers, so that ties and zeros are common and every sum of squares is exact.
spectra_of = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def kept(spectra: list[Tensor], ranks: tuple[int, ...] | list[int]) -> float:
    return sum(float(spectrum[:rank].square().sum()) for spectrum, rank in zip(spectra, ranks, strict=True))


def spent(costs: list[int], ranks: tuple[int, ...] | list[int]) -> int:
    return sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))


def one_at_a_time(spectra: list[Tensor], costs: list[int], budget: int) -> list[int]:
    """The slow and obvious allotment."""
    ranks = [1] * len(spectra)
    while True:
        gains = [
            (-(float(spectra[i][ranks[i]]) ** 2) / costs[i], i)
            for i in range(len(spectra))
            if ranks[i] < len(spectra[i]) and spectra[i][ranks[i]] > 0
            if spent(costs, ranks) + costs[i] <= budget
        ]
        if not gains:
            return ranks
        ranks[min(gains)[1]] += 1


@settings(deadline=None, max_examples=200, derandomize=True)
@given(spectra_of, st.integers(1, 100))
def test_the_rank_is_the_smallest_that_keeps_the_share(values: Tensor, percent: int) -> None:
    rank = rank_for_energy(values, percent / 100)
    squares = [int(value) ** 2 for value in values]
    assert 1 <= rank <= len(values)
    assert 100 * sum(squares[:rank]) >= percent * sum(squares)
    assert rank == 1 or 100 * sum(squares[: rank - 1]) < percent * sum(squares)


def test_ranks_for_energy_by_hand() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])  # squares 9 4 1 1 1, of 16
    assert [rank_for_energy(values, share) for share in (0.01, 9 / 16, 0.57, 13 / 16, 0.9, 1.0)] == [1, 1, 2, 2, 4, 5]
    assert rank_for_energy(torch.zeros(4), 1.0) == 1
    assert rank_for_energy(torch.tensor([2.0, 0.0, 0.0]), 1.0) == 1
    assert rank_for_energy(torch.tensor([0.5]), 0.9) == 1


def test_rounding_takes_no_rank() -> None:
    """Each of a thousand equal values is a thousandth, though their float64 sum is not exact."""
    assert rank_for_energy(torch.full((1000,), 0.1, dtype=torch.float64).sqrt(), 0.5) == 500
    assert rank_for_energy(torch.tensor([1.0] * 3 + [4e-8] * 700, dtype=torch.float64), 1.0) == 3


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.tuples(spectra_of, st.integers(1, 5)), min_size=1, max_size=4), st.integers(0, 60))
def test_ranks_are_taken_by_squared_value_per_parameter(pairs: list[tuple[Tensor, int]], extra: int) -> None:
    spectra, costs = [spectrum for spectrum, _ in pairs], [cost for _, cost in pairs]
    budget = sum(costs) + extra
    ranks = allot_ranks(spectra, costs, budget)
    assert ranks == one_at_a_time(spectra, costs, budget)
    assert spent(costs, ranks) <= budget
    assert allot_ranks([spectrum.float() for spectrum in spectra], costs, budget) == ranks


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(spectra_of, min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 60))
def test_no_choice_keeps_more_at_one_cost(spectra: list[Tensor], cost: int, extra: int) -> None:
    costs = [cost] * len(spectra)
    budget = sum(costs) + extra
    choices = itertools.product(*(range(1, len(spectrum) + 1) for spectrum in spectra))
    best = max(kept(spectra, choice) for choice in choices if spent(costs, choice) <= budget)
    assert kept(spectra, allot_ranks(spectra, costs, budget)) == best


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.tuples(spectra_of, st.integers(1, 5)), min_size=1, max_size=3), st.integers(0, 60))
def test_no_choice_keeps_more_by_a_whole_value(pairs: list[tuple[Tensor, int]], extra: int) -> None:
    """With costs that differ the greedy choice misses the best one by less than one value that did not fit."""
    spectra, costs = [spectrum for spectrum, _ in pairs], [cost for _, cost in pairs]
    budget = sum(costs) + extra
    ranks = allot_ranks(spectra, costs, budget)
    over = [float(s[r]) ** 2 for s, r in zip(spectra, ranks, strict=True) if r < len(s)]
    choices = itertools.product(*(range(1, len(spectrum) + 1) for spectrum in spectra))
    best = max(kept(spectra, choice) for choice in choices if spent(costs, choice) <= budget)
    assume(over)
    assert best <= kept(spectra, ranks) + max(over)


def test_a_rank_too_dear_leaves_the_rest_to_cheaper_ones() -> None:
    dear, cheap = torch.tensor([9.0, 8.0]), torch.tensor([2.0, 1.0, 0.5])
    assert allot_ranks([dear, cheap], [10, 1], 12) == [1, 2]
    assert allot_ranks([dear, cheap], [10, 1], 21) == [2, 1]
    assert allot_ranks([dear, cheap], [10, 1], 10**12) == [2, 3]


def test_zero_is_never_bought_and_equal_gains_go_to_the_earlier() -> None:
    assert allot_ranks([torch.zeros(5), torch.tensor([1.0, 1.0, 0.0])], [1, 1], 100) == [1, 2]
    assert allot_ranks([torch.ones(3), torch.ones(3)], [2, 2], 8) == [3, 1]
    assert allot_ranks([], [], 0) == []


def test_a_budget_below_rank_one_everywhere_names_the_least() -> None:
    with pytest.raises(ValueError, match=r"budget of 11 .* takes 12$"):
        allot_ranks([torch.ones(3), torch.ones(3)], [5, 7], 11)
    assert allot_ranks([torch.ones(3), torch.ones(3)], [5, 7], 12) == [1, 1]


def test_thousands_of_matrices_take_no_time() -> None:
    generator = torch.Generator().manual_seed(0)
    spectra = [torch.rand(500, generator=generator).sort(descending=True).values for _ in range(1000)]
    costs = [1000 + 7 * k for k in range(1000)]
    started = time.process_time()
    ranks = allot_ranks(spectra, costs, 100 * sum(costs))
    assert time.process_time() - started < 2.0
    assert 100 * sum(costs) - spent(costs, ranks) < max(costs)
