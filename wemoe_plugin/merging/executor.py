"""Carry out a plan: threads read ranges, compute, and write them to files whose space is already allocated."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.allocator import return_large_buffers
from wemoe_plugin.merging.journal import Journal
from wemoe_plugin.merging.memory import CHUNK_ELEMENTS, available_processors, fitting_chunk, piece_memory
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.work import Piece, bytes_of_piece, compare_twins, make_worker, pieces

Progress = Callable[[int], None]
"""Called from any thread with the number of input bytes that have just been dealt with."""


def execute_plan(
    plan: MergePlan,
    directory: Path,
    *,
    jobs: int | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    max_memory: int | None = None,
    device: str = "cpu",
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the plan's weight files into an existing directory.

    Args:
        plan: what to do.
        directory: where; it must not hold any of the plan's files, unless the journal says that some work is done.
        jobs: threads; default the number of processors this process may use.
        chunk_elements: elements per range. Neither this nor ``jobs`` changes a byte of elementwise results.
        max_memory: bytes that all threads' buffers together may take; None for as much as the largest tensors need.
        device: where the arithmetic is done, a name of torch's.
        journal: knows which pieces of work an earlier run has done, and is told which ones this run does.
        progress: told about input bytes as they are done.

    Raises:
        CheckpointError: an input holds NaN or infinity, integer buffers differ, or a file was changed meanwhile.
        PlanError: the disk is full, or one tensor needs more than ``max_memory``.
    """
    jobs = jobs or available_processors()
    operations = plan.operations
    if max_memory is not None:
        chunk_elements = fitting_chunk(operations, plan.dtype, chunk_elements, max_memory)
    needs = [piece_memory(operation, plan.dtype, chunk_elements) for operation in operations]
    largest = max(range(len(needs)), key=lambda i: needs[i])
    if max_memory is not None and needs[largest] > max_memory:
        name = operations[largest].output.name
        raise PlanError(f"{name!r} needs {needs[largest]:,} bytes at once; --max-memory allows {max_memory:,}")
    budget = _Budget(needs[largest] * jobs if max_memory is None else max_memory)
    done: frozenset[Piece] = frozenset() if journal is None else journal.done()
    with ExitStack() as stack:
        reader = stack.enter_context(RangeReader(plan.stamps))
        compare_twins(plan.twins, reader, chunk_elements)
        places = stack.enter_context(output_files(plan, directory))
        worker = make_worker(operations, plan.dtype, device, reader, places)
        stack.enter_context(_one_thread_per_operation())
        if any(operation.whole for operation in operations):
            return_large_buffers()
        queue = _Queue(pieces(plan, chunk_elements, done))

        def drain() -> None:
            for piece in queue:
                operation = operations[piece.operation]
                with queue.ended_by_failure(), budget.holding(needs[piece.operation]):
                    worker.run(operation, piece.start, piece.elements)
                    if journal is not None:
                        journal.note(piece)
                if progress is not None:
                    progress(bytes_of_piece(operation, piece))

        with ThreadPoolExecutor(jobs, thread_name_prefix="merge") as pool, queue.ended_by_failure():
            for future in [pool.submit(drain) for _ in range(jobs)]:
                future.result()
        reader.check_unchanged()


class _Queue:
    """Hands every range to one thread; made as they are drawn, so that a large model needs no long list of them."""

    def __init__(self, items: Iterator[Piece]) -> None:
        self._items = items
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._lock:
                item = next(self._items, None)
            if item is None:
                return
            yield item

    @contextmanager
    def ended_by_failure(self) -> Iterator[None]:
        """A failure inside, or an interrupt, is the end of the queue for all threads."""
        try:
            yield
        except BaseException:
            with self._lock:
                self._items = iter(())
            raise


@contextmanager
def output_files(plan: MergePlan, directory: Path) -> Iterator[dict[str, TensorFile]]:
    """Every output file with its space, by the name of the tensors in it; brought to disk at the end.

    Raises:
        PlanError: the disk is full, or cannot be written to.
    """
    places: dict[str, TensorFile] = {}
    with ExitStack() as opened:
        try:
            for planned in plan.files:
                tensors = ((t.name, t.dtype, t.shape) for t in planned.tensors)
                file = TensorFile(directory / planned.name, tensors)
                opened.callback(file.close)
                places |= {tensor.name: file for tensor in planned.tensors}
            yield places
            for file in dict.fromkeys(places.values()):
                file.sync()
        except OSError as error:
            raise PlanError(f"{directory.parent}: cannot write the output: {error.strerror or error}") from error


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Our threads are the parallelism; torch's own, if torch takes part, would only compete with them."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Budget:
    """Admits work while the memory of all admitted work stays within a sum."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()
