"""Truncated decompositions are as good as the best there is, and the same every time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wemoe_plugin.task_vectors.low_rank import (
    singular_values,
    singular_values_of_product,
    truncated_product,
    truncated_svd,
)

# The first two are large enough for the iteration, the next two are not.
SHAPES = [(400, 300), (300, 400), (60, 90), (90, 60)]
SPECTRA = {
    "equal": torch.ones_like,
    "slow power law": lambda k: k**-0.3,
    "power law": lambda k: k**-1.0,
    "steep power law": lambda k: k**-2.0,
    "slow exponential": lambda k: torch.exp(-k / 40),
    "exponential": lambda k: torch.exp(-k / 4),
    "a step": lambda k: torch.where(k <= 10, 1.0, 0.9),
}
# What the float32 of the factors and of the iteration loses, relative to the norm of τ.
ROUNDING = 1e-6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(rows: int, columns: int, sigma: Tensor) -> Tensor:
    left, right = (torch.linalg.qr(normal(n, len(sigma), seed=n)).Q for n in (rows, columns))
    return (left * sigma) @ right.T


def product(down: Tensor, up: Tensor) -> Tensor:
    return up.double().T @ down.double()


def assert_best(vector: Tensor, down: Tensor, up: Tensor, rank: int, slack: float = 0.01) -> None:
    """The error is within ``slack`` of the optimal one, which by Eckart and Young is the norm of what is cut off."""
    assert down.shape == (rank, vector.shape[1])
    assert up.shape == (rank, vector.shape[0])
    assert down.dtype == up.dtype == torch.float32
    assert down.is_contiguous()  # as safetensors stores them
    assert up.is_contiguous()
    error = torch.linalg.norm(vector.double() - product(down, up))
    best = torch.linalg.norm(torch.linalg.svdvals(vector.double())[rank:])
    assert error <= (1.0 + slack) * best + ROUNDING * torch.linalg.norm(vector.double())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_within_one_percent_of_the_best(shape: tuple[int, int], spectrum: str) -> None:
    sigma = SPECTRA[spectrum](torch.arange(1, min(shape) + 1, dtype=torch.float64))
    vector = with_spectrum(*shape, sigma)
    for rank in (1, 5, 30):
        assert_best(vector, *truncated_svd(vector, rank), rank, slack=0.003)  # with margin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_too(shape: tuple[int, int], dtype: torch.dtype) -> None:
    vector = normal(*shape).to(dtype)
    for rank in (1, 8, 33, 34, min(shape)):
        assert_best(vector, *truncated_svd(vector, rank), rank)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_small_matrices_of_any_shape_are_cut_optimally(rows: int, columns: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    entries = st.lists(st.integers(-3, 3), min_size=rows * columns, max_size=rows * columns)
    vector = torch.tensor(data.draw(entries), dtype=torch.float32).reshape(rows, columns)
    assert_best(vector, *truncated_svd(vector, rank), rank, slack=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e12])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_low_rank_is_kept_whole_at_any_scale(shape: tuple[int, int], scale: float) -> None:
    vector = (scale * with_spectrum(*shape, torch.tensor([1.0, 0.5, 0.1, 1e-3], dtype=torch.float64))).float()
    for rank in (4, 20):
        error = torch.linalg.norm(vector.double() - product(*truncated_svd(vector, rank)))
        assert error <= 1e-6 * torch.linalg.norm(vector.double())


@pytest.mark.parametrize("shape", [*SHAPES, (1, 5), (5, 1), (1, 1)])
def test_factors_are_ordered_and_the_scaling_is_in_up(shape: tuple[int, int]) -> None:
    rank = min(8, *shape)
    vector = with_spectrum(*shape, 0.5 ** torch.arange(min(shape), dtype=torch.float64))
    down, up = (factor.double() for factor in truncated_svd(vector, rank))
    torch.testing.assert_close(down @ down.T, torch.eye(rank).double(), atol=1e-5, rtol=0)
    sigma = torch.linalg.svdvals(vector)[:rank]
    torch.testing.assert_close(torch.linalg.norm(up, dim=1), sigma, atol=1e-6, rtol=1e-5)
    for fewer in range(1, rank):
        error = torch.linalg.norm(vector - up[:fewer].T @ down[:fewer])
        torch.testing.assert_close(error, torch.linalg.norm(torch.linalg.svdvals(vector)[fewer:]), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 5), (5, 1)])
def test_zero_stays_exactly_zero(shape: tuple[int, int]) -> None:
    down, up = truncated_svd(torch.zeros(shape), min(8, *shape))
    assert not up.any()
    torch.testing.assert_close(down @ down.T, torch.eye(len(down)), atol=1e-5, rtol=0)


def test_the_result_depends_on_the_matrix_alone() -> None:
    """Neither on torch's global generator, which stays as it is, nor on what other threads decompose."""
    vectors = [normal(300, 400, seed=k).float() for k in range(4)]
    alone = [truncated_svd(vector, 8) for vector in vectors]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda vector: truncated_svd(vector, 8), vectors))
    assert torch.equal(torch.get_rng_state(), state)
    for (down, up), (other_down, other_up) in zip(alone, together, strict=True):
        assert torch.equal(down, other_down)
        assert torch.equal(up, other_up)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_factors_of_what_is_not_finite(shape: tuple[int, int], value: float) -> None:
    vector = normal(*shape).float()
    vector[3, 4] = value
    with pytest.raises(torch.linalg.LinAlgError):
        truncated_svd(vector, 8)
    with pytest.raises(torch.linalg.LinAlgError):
        singular_values(vector)
    with pytest.raises(torch.linalg.LinAlgError):
        truncated_product(vector, vector, 1)
    with pytest.raises(torch.linalg.LinAlgError):
        singular_values_of_product(vector, vector)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 5), (5, 1), (1, 1)])
def test_singular_values_are_those_of_the_full_decomposition(shape: tuple[int, int]) -> None:
    for vector in (normal(*shape), normal(*shape).float(), torch.zeros(shape), torch.ones(shape)):
        values = singular_values(vector)
        expected = torch.linalg.svdvals(vector.double())
        assert values.dtype == torch.float64
        assert (values[:-1] >= values[1:]).all()
        torch.testing.assert_close(values, expected, atol=1e-7 * float(expected[0]), rtol=1e-8)


# rank of the product, in, out: fewer rows than either side, more than one, more than both
FACTORS = [(6, 40, 30), (6, 30, 40), (35, 40, 30), (35, 30, 40), (50, 40, 30), (1, 5, 4), (3, 1, 4), (3, 4, 1)]


@pytest.mark.parametrize(("rows", "columns", "out"), FACTORS)
def test_a_product_is_cut_as_the_matrix_it_stands_for(rows: int, columns: int, out: int) -> None:
    # Uneven rows: the factors of a sum of several adapters are neither orthogonal nor of one size.
    weights = torch.linspace(1.0, 0.01, rows, dtype=torch.float64)[:, None]
    down, up = weights * normal(rows, columns), normal(rows, out, seed=1)
    for rank in range(1, min(rows - 1, columns, out) + 1, 4):
        assert_best(product(down, up), *truncated_product(down, up, rank), rank, slack=1e-6)


@pytest.mark.parametrize(("rows", "columns", "out"), FACTORS)
def test_singular_values_of_a_product_are_those_of_the_matrix(rows: int, columns: int, out: int) -> None:
    down, up = normal(rows, columns), normal(rows, out, seed=1)
    values, expected = singular_values_of_product(down, up), torch.linalg.svdvals(product(down, up))
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, expected[: min(rows, columns, out)], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        singular_values_of_product(down.float(), up.float()), values, atol=1e-5 * float(values[0]), rtol=1e-5
    )


def test_factors_that_are_thin_enough_are_left_as_they_are() -> None:
    down, up = normal(4, 9).float(), normal(4, 7).float()
    for rank in (4, 5):
        same_down, same_up = truncated_product(down, up, rank)
        assert same_down is down
        assert same_up is up


def test_repeated_rows_take_one_rank_together() -> None:
    """Two copies of one adapter are one of twice the size: nothing is lost at its rank."""
    down, up = normal(3, 20), normal(3, 15, seed=1)
    thin = truncated_product(torch.cat([down, down]), torch.cat([up, up]), 3)
    torch.testing.assert_close(product(*thin), 2 * product(down, up), atol=1e-5, rtol=1e-5)
