"""Which of two ways a truncated SVD goes, known from shape and rank alone, without torch."""

from __future__ import annotations

# Up to this side all eigenvectors of a Gram matrix take milliseconds, and the float64 result is worth them.
SMALL_SIDE = 256
LEAST_OVERSAMPLING = 16
# From about this part of the smaller side, all eigenvectors are no slower than the iteration.
LARGEST_PART = 1 / 6


def sample_size(shape: tuple[int, int], rank: int) -> int | None:
    """How many directions the iteration follows for a matrix (out, in); None where all eigenvectors are taken."""
    shorter, sample = min(shape), rank + max(LEAST_OVERSAMPLING, rank // 2)
    return None if shorter <= SMALL_SIDE or sample > LARGEST_PART * shorter else sample
