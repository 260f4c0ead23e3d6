"""Carry out a plan: read ranges, compute, and write them to files whose space is already allocated.

Threads of this process do so, or the workers of a Ray cluster.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.errors import WemoeError
from wemoe_plugin.merging.journal import Journal
from wemoe_plugin.merging.memory import (
    CHUNK_ELEMENTS,
    DEVICE_CHUNK_ELEMENTS,
    available_processors,
    fitting_chunk,
    piece_memory,
)
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.problems import takes_too_much
from wemoe_plugin.merging.work import Piece, Worker, bytes_of_piece, compare_twins, make_worker, pieces

Progress = Callable[[int], None]
"""Called from any thread with the number of input bytes that have just been dealt with."""

ENGINES = ("threads", "ray")


def check_engine(name: str) -> None:
    """Refuse an engine that is not there.

    Raises:
        WemoeError: there is none of this name, or Ray is not installed.
    """
    if name not in ENGINES:
        raise WemoeError(f"--engine {name}: is none of {', '.join(ENGINES)}")
    if name == "ray":
        from wemoe_plugin.merging.ray_engine import import_ray

        import_ray()


def execute_plan(
    plan: MergePlan,
    directory: Path,
    *,
    engine: str = "threads",
    jobs: int | None = None,
    chunk_elements: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the plan's weight files into an existing directory.

    Args:
        plan: what to do.
        directory: where; it must not hold any of the plan's files, unless the journal says that some work is done.
        engine: who does the work: ``threads`` of this process, or workers of ``ray``.
        jobs: threads or workers; default the number of processors this process may use, or the cluster has.
        chunk_elements: elements per range; default what suits the device. Neither this nor ``jobs`` changes a byte of
            elementwise results.
        max_memory: bytes that the buffers of all threads or workers together may take; None for as much as the largest
            tensors need.
        device: where the arithmetic is done, a name of torch's.
        journal: knows which pieces of work an earlier run has done, and is told which ones this run does.
        progress: told about input bytes as they are done.

    Raises:
        CheckpointError: an input holds NaN or infinity, integer buffers differ, or a file was changed meanwhile.
        PlanError: one tensor needs more than ``max_memory``.
        OSError: the disk is full, or cannot be written to.
        WemoeError: there is no such engine, or what `wemoe_plugin.merging.ray_engine.run_on_ray` raises.
    """
    check_engine(engine)
    operations = plan.operations
    chunk_elements = chunk_elements or (CHUNK_ELEMENTS if device.startswith("cpu") else DEVICE_CHUNK_ELEMENTS)
    if max_memory is not None:
        chunk_elements = fitting_chunk(operations, plan.dtype, chunk_elements, max_memory)
    needs = [piece_memory(operation, plan.dtype, chunk_elements) for operation in operations]
    largest = max(range(len(needs)), key=lambda i: needs[i])
    if max_memory is not None and needs[largest] > max_memory:
        raise takes_too_much(operations[largest].output, needs[largest], max_memory)
    done: frozenset[Piece] = frozenset() if journal is None else journal.done()
    work = pieces(plan, chunk_elements, done)

    def finished(piece: Piece) -> None:
        if journal is not None:
            journal.note(piece)
        if progress is not None:
            progress(bytes_of_piece(operations[piece.operation], piece))

    if progress is not None:
        for piece in done:
            progress(bytes_of_piece(operations[piece.operation], piece))
    with ExitStack() as stack:
        reader = stack.enter_context(RangeReader(plan.stamps))
        compare_twins(plan.twins, reader, chunk_elements)
        places = stack.enter_context(output_files(plan, directory))
        if engine == "ray":
            from wemoe_plugin.merging.ray_engine import run_on_ray

            sync_all(places)
            run_on_ray(plan, directory, work, needs, finished, jobs=jobs, max_memory=max_memory, device=device)
        else:
            jobs = jobs or available_processors()
            budget = _Budget(needs[largest] * jobs if max_memory is None else max_memory)
            worker = make_worker(operations, plan.dtype, device, reader, places)
            _run_in_threads(plan, worker, work, needs, finished, jobs, budget)
        reader.check_unchanged()


def _run_in_threads(
    plan: MergePlan,
    worker: Worker,
    work: Iterator[Piece],
    needs: Sequence[int],
    finished: Callable[[Piece], None],
    jobs: int,
    budget: _Budget,
) -> None:
    queue = _Queue(work)

    def drain() -> None:
        for piece in queue:
            with queue.ended_by_failure(), budget.holding(needs[piece.operation]):
                worker.run(plan.operations[piece.operation], piece.start, piece.elements)
                finished(piece)

    with (
        one_thread_per_operation(),
        ThreadPoolExecutor(jobs, thread_name_prefix="merge") as pool,
        queue.ended_by_failure(),
    ):
        for future in [pool.submit(drain) for _ in range(jobs)]:
            future.result()


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
        OSError: the disk is full, or cannot be written to.
    """
    places: dict[str, TensorFile] = {}
    with ExitStack() as opened:
        for planned in plan.files:
            file = TensorFile(directory / planned.name, ((t.name, t.dtype, t.shape) for t in planned.tensors))
            opened.callback(file.close)
            places |= {tensor.name: file for tensor in planned.tensors}
        yield places
        sync_all(places)


def sync_all(places: Mapping[str, TensorFile]) -> None:
    """Bring what is written of these files to the disk."""
    for file in dict.fromkeys(places.values()):
        file.sync()


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Our threads and workers are the parallelism; torch's own, if torch takes part, would only compete with them."""
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
