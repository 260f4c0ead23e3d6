"""The entries of largest magnitude, exactly, in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wemoe_plugin.task_vectors.sparse import largest


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_of_ties_the_lower_indices_are_kept(rows: int, columns: int, data: st.DataObject) -> None:
    entries = data.draw(st.lists(st.integers(-2, 2), min_size=rows * columns, max_size=rows * columns))
    count = data.draw(st.integers(1, rows * columns))
    values, indices = largest(torch.tensor(entries, dtype=torch.float32).reshape(rows, columns), count)
    expected = sorted(sorted(range(len(entries)), key=lambda index: (-abs(entries[index]), index))[:count])
    assert indices.tolist() == expected
    assert values.tolist() == [entries[index] for index in expected]
    assert indices.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.9, 1.0])
def test_no_other_entries_of_as_many_leave_a_smaller_error(dtype: torch.dtype, density: float) -> None:
    vector = torch.randn(120, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    count = int(density * vector.numel())
    values, indices = largest(vector, count)
    assert values.dtype == dtype
    assert (indices[1:] > indices[:-1]).all()
    assert torch.equal(values, vector.flatten()[indices.long()])
    assert torch.equal(values.abs().sort().values, vector.abs().flatten().sort().values[-count:])


def test_a_matrix_in_any_memory_order_is_indexed_by_rows() -> None:
    vector = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(largest(vector.T, 9), largest(vector.T.contiguous(), 9), strict=True):
        assert torch.equal(got, expected)


def test_infinity_is_large_and_nan_is_refused() -> None:
    vector = torch.tensor([[1.0, float("-inf")], [3.0, float("inf")]])
    assert largest(vector, 3)[1].tolist() == [1, 2, 3]
    vector[0, 0] = float("nan")
    for count in (1, 4):
        with pytest.raises(ValueError, match="NaN"):
            largest(vector, count)


def test_a_matrix_too_large_for_indices_of_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(65536, 32768\) has too many elements"):
        largest(torch.zeros(1, 1).expand(65536, 32768), 1)
