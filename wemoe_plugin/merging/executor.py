"""Carry out a plan: threads read ranges, compute, and write them to files whose space is already allocated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wemoe_plugin.checkpoints.ranges import TORCH_DTYPE, RangeReader, TensorFile
from wemoe_plugin.checkpoints.sources import Source
from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.merging.elementwise import mix, task_vectors
from wemoe_plugin.merging.memory import CHUNK_ELEMENTS, available_processors, fitting_chunk, piece_memory
from wemoe_plugin.merging.operations import Combine, Copy, Operation, OutputTensor, Upscale
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.task_vectors.low_rank import truncated_svd

Progress = Callable[[int], None]
"""Called from any thread with the number of input bytes that have just been dealt with."""


@dataclass(frozen=True)
class _Range:
    """Elements ``start`` to ``start + count`` of an operation's tensor."""

    operation: Operation
    start: int
    count: int


def execute_plan(
    plan: MergePlan,
    directory: Path,
    *,
    jobs: int | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the plan's weight files into an existing directory.

    Args:
        plan: what to do.
        directory: where; it must not hold any of the plan's files.
        jobs: threads; default the number of processors this process may use.
        chunk_elements: elements per range. Neither this nor ``jobs`` changes a byte of elementwise results.
        max_memory: bytes that all threads' buffers together may take; None for as much as the largest tensors need.
        progress: told about input bytes as they are done.

    Raises:
        CheckpointError: an input holds NaN or infinity, integer buffers differ, or a file was changed meanwhile.
        PlanError: the disk is full, or one tensor needs more than ``max_memory``.
    """
    jobs = jobs or available_processors()
    if max_memory is not None:
        chunk_elements = fitting_chunk(plan.operations, plan.dtype, chunk_elements, max_memory)
    needs = {o.output.name: piece_memory(o, plan.dtype, chunk_elements) for o in plan.operations}
    largest = max(needs, key=lambda name: needs[name])
    if max_memory is not None and needs[largest] > max_memory:
        raise PlanError(f"{largest!r} needs {needs[largest]:,} bytes at once; --max-memory allows {max_memory:,}")
    budget = _Budget(needs[largest] * jobs if max_memory is None else max_memory)
    with ExitStack() as stack:
        files = {file for operation in plan.operations for source in operation.sources for file in source.files}
        reader = stack.enter_context(RangeReader(files))
        places = stack.enter_context(_allocated(plan, directory))
        stack.enter_context(_one_thread_per_operation())
        worker = _Worker(reader, places, TORCH_DTYPE[plan.dtype], progress)
        queue = _Queue(_ranges(plan, chunk_elements))

        def drain() -> None:
            for item in queue:
                with queue.ended_by_failure(), budget.holding(needs[item.operation.output.name]):
                    worker.run(item)

        with ThreadPoolExecutor(jobs, thread_name_prefix="merge") as pool, queue.ended_by_failure():
            for future in [pool.submit(drain) for _ in range(jobs)]:
                future.result()


def _ranges(plan: MergePlan, chunk_elements: int) -> Iterator[_Range]:
    for operation in plan.operations:
        total = operation.output.elements
        step = total if operation.whole else chunk_elements
        for start in range(0, total, max(step, 1)):
            yield _Range(operation, start, min(step, total - start))


class _Queue:
    """Hands every range to one thread; made as they are drawn, so that a large model needs no long list of them."""

    def __init__(self, items: Iterator[_Range]) -> None:
        self._items = items
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[_Range]:
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
def _allocated(plan: MergePlan, directory: Path) -> Iterator[dict[str, TensorFile]]:
    """Every output file with its space, by the name of the tensors in it; brought to disk at the end."""
    places: dict[str, TensorFile] = {}
    with ExitStack() as opened:
        try:
            for planned in plan.files:
                file = TensorFile(directory / planned.name, ((t.name, t.dtype, t.shape) for t in planned.tensors))
                opened.callback(file.close)
                places |= {tensor.name: file for tensor in planned.tensors}
            yield places
            for file in dict.fromkeys(places.values()):
                file.sync()
        except OSError as error:
            raise PlanError(f"{directory.parent}: cannot write the output: {error.strerror or error}") from error


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Our threads are the parallelism; torch's own would only compete with them."""
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


class _Worker:
    """Carries out one range of one operation at a time; shared by all threads."""

    def __init__(
        self, reader: RangeReader, files: dict[str, TensorFile], dtype: torch.dtype, progress: Progress | None
    ) -> None:
        self.reader = reader
        self.files = files
        self.dtype = dtype
        self.progress = progress

    @torch.inference_mode()
    def run(self, item: _Range) -> None:
        operation = item.operation
        if isinstance(operation, Copy):
            self._copy(operation, item)
        elif isinstance(operation, Combine):
            self._combine(operation, item)
        else:
            self._upscale(operation, item)
        if self.progress is not None:
            total, elements = sum(source.nbytes for source in operation.sources), operation.output.elements
            self.progress(total * (item.start + item.count) // elements - total * item.start // elements)

    def _copy(self, operation: Copy, item: _Range) -> None:
        values = self._read_stored(operation.source, item)
        _check_finite(values, operation.source)
        for other in operation.agreeing:
            if not torch.equal(self._read_stored(other, item).to(values.dtype), values):
                raise CheckpointError(f"{other.file}: the integer buffer {other.name!r} differs from the base's")
        self._store(operation.output, item.start, values)

    def _combine(self, operation: Combine, item: _Range) -> None:
        mixture = operation.mixture
        base = None if mixture.base is None else self._read(mixture.base, item)
        values = mix(mixture, base, (self._read(source, item) for source in mixture.inputs))
        self._store(operation.output, item.start, values)

    def _upscale(self, operation: Upscale, item: _Range) -> None:
        mixture = operation.mixture
        assert mixture.base is not None, "task vectors have a base"
        base = self._read(mixture.base, item)

        def inputs() -> Iterator[Tensor]:
            for k, source in enumerate(mixture.inputs):
                values = self._read(source, item)
                (vector,) = task_vectors(base, [values])
                self._store_vector(operation, item, k, vector)
                yield values

        self._store(operation.output, item.start, mix(mixture, base, inputs()))

    def _store_vector(self, operation: Upscale, item: _Range, k: int, vector: Tensor) -> None:
        """Keep a range of expert k's task vector, or the factors of the whole of it."""
        if operation.rank is None:
            (target,) = operation.vectors
            self._store(target, k * operation.output.elements + item.start, vector)
            return
        factors = truncated_svd(vector.view(operation.output.shape), operation.rank)
        for target, factor in zip(operation.vectors, factors, strict=True):
            self._store(target, k * factor.numel(), factor.reshape(-1))

    def _read(self, source: Source, item: _Range) -> Tensor:
        values = self.reader.read_as(source, item.start, item.count, self.dtype)
        if not _is_finite(values):
            _check_finite(self._read_stored(source, item), source)
            raise CheckpointError(f"{source.file}: {source.name!r} does not fit the recipe's dtype; use dtype: float32")
        return values

    def _read_stored(self, source: Source, item: _Range) -> Tensor:
        return self.reader.read_stored(source, item.start, item.count, self.dtype)

    def _store(self, output: OutputTensor, start: int, values: Tensor) -> None:
        rounded = values.to(TORCH_DTYPE[output.dtype])
        if not _is_finite(rounded):
            raise PlanError(f"{output.name!r} is too large for {output.dtype}; use out_dtype: bfloat16 or float32")
        self.files[output.name].write(output.name, start, rounded)


def _is_finite(values: Tensor) -> bool:
    """A finite sum shows finite values in one pass; only a suspicious one is looked at again."""
    if not values.is_floating_point() or torch.isfinite(values.sum(dtype=torch.float64)):
        return True
    return bool(torch.isfinite(values).all())


def _check_finite(values: Tensor, source: Source) -> None:
    if not _is_finite(values):
        what = "NaN" if torch.isnan(values).any() else "infinity"
        raise CheckpointError(f"{source.file}: {source.name!r} holds {what}")
