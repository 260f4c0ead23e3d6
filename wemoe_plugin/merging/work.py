"""A plan as independent pieces of work: ranges of elements, or whole tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from wemoe_plugin.checkpoints.header import ITEM_BYTES, StoredTensor
from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.merging.allocator import return_large_buffers
from wemoe_plugin.merging.memory import is_plain
from wemoe_plugin.merging.operations import Operation
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.tied import Twins


class Piece(NamedTuple):
    """Elements ``start`` to ``start + elements`` of the tensor that an operation makes, by the operation's place."""

    operation: int
    start: int
    elements: int


class Worker(Protocol):
    """Carries out pieces of operations; shared by all threads."""

    def run(self, operation: Operation, start: int, count: int) -> None:
        """Make elements ``start`` to ``start + count`` of the operation's tensor and store them."""


def pieces(plan: MergePlan, chunk_elements: int, done: Collection[Piece] = ()) -> Iterator[Piece]:
    """All the work of a plan but for what is done; drawn one by one, a large model needs no long list."""
    for i, operation in enumerate(plan.operations):
        total = operation.output.elements
        step = total if operation.whole else chunk_elements
        for start in range(0, total, max(step, 1)):
            piece = Piece(i, start, min(step, total - start))
            if piece not in done:
                yield piece


def bytes_of_piece(operation: Operation, piece: Piece) -> int:
    """A piece's share of what its operation reads; the shares of all pieces add up to it."""
    total, elements = sum(source.nbytes for source in operation.sources), operation.output.elements
    return total * (piece.start + piece.elements) // elements - total * piece.start // elements


def compare_twins(twins: Iterable[Twins], reader: RangeReader, chunk_elements: int) -> None:
    """See that tied weights are equal.

    Raises:
        CheckpointError: two are not; their model is not tied, and does not fit the base.
    """
    for pair in twins:
        kept, dropped = pair.kept, pair.dropped
        stored = [source for source in (kept, dropped) if isinstance(source, StoredTensor)]
        same = len(stored) == 2 and kept.dtype == dropped.dtype
        for start in range(0, kept.elements if same else 0, chunk_elements):
            count = min(chunk_elements, kept.elements - start) * ITEM_BYTES[kept.dtype]
            first, second = bytearray(count), bytearray(count)
            reader.fill(stored[0], start, memoryview(first))
            reader.fill(stored[1], start, memoryview(second))
            same = same and first == second
        if not same:
            raise CheckpointError(
                f"{dropped.file}: {dropped.name!r} differs from {kept.name!r}: it is not tied to it, but another model "
                "of the recipe keeps only one of the two; tied and untied models cannot be merged"
            )


def make_worker(
    operations: Collection[Operation], dtype: str, device: str, reader: RangeReader, files: Mapping[str, TensorFile]
) -> Worker:
    """Who carries out a plan's operations: plain merges need numpy alone, all else imports torch.

    Args:
        operations: of the plan.
        dtype: of the arithmetic, a safetensors name.
        device: where whole tensors are computed; ``cpu`` or a name of torch's.
        reader: of all sources.
        files: where each tensor is stored, by its name.
    """
    if device == "cpu" and all(is_plain(operation, dtype) for operation in operations):
        from wemoe_plugin.merging.array_worker import ArrayWorker

        return ArrayWorker(dtype, reader, files)
    from wemoe_plugin.merging.tensor_worker import TensorWorker

    if any(operation.whole for operation in operations):
        return_large_buffers()
    return TensorWorker(dtype, device, reader, files)
