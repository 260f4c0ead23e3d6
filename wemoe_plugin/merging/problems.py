"""What can be wrong with values, found while they stream."""

from __future__ import annotations

from wemoe_plugin.checkpoints.sources import Source
from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.merging.operations import OutputTensor


def holds(source: Source, nan: bool) -> CheckpointError:
    """An input with NaN or infinity."""
    return CheckpointError(f"{source.file}: {source.name!r} holds {'NaN' if nan else 'infinity'}")


def does_not_fit(source: Source) -> CheckpointError:
    """An input whose values become infinite in the dtype of the arithmetic."""
    return CheckpointError(f"{source.file}: {source.name!r} does not fit the recipe's dtype; use dtype: float32")


def too_large(output: OutputTensor) -> PlanError:
    """A result that its dtype cannot hold."""
    return PlanError(f"{output.name!r} is too large for {output.dtype}; use out_dtype: bfloat16 or float32")


def takes_too_much(output: OutputTensor, needed: int, allowed: int) -> PlanError:
    """A tensor that is worked on as a whole and does not fit."""
    return PlanError(f"{output.name!r} needs {needed:,} bytes at once; --max-memory allows {allowed:,}")


def buffer_differs(source: Source) -> CheckpointError:
    """Integer buffers cannot be merged."""
    return CheckpointError(f"{source.file}: the integer buffer {source.name!r} differs from the base's")
