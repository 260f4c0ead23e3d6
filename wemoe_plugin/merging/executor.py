"""Carry out a plan: threads read ranges, compute, and write them to files whose space is already allocated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wemoe_plugin.checkpoints.ranges import TORCH_DTYPE, RangeReader, TensorFile
from wemoe_plugin.checkpoints.sources import AdaptedTensor, Source
from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.merging.elementwise import mix, task_vectors
from wemoe_plugin.merging.memory import CHUNK_ELEMENTS, available_processors, fitting_chunk, operation_memory
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
    sources = [source for operation in plan.operations for source in operation.sources]
    work = list(_ranges(plan, chunk_elements))
    needs = [operation_memory(item.operation, item.count, plan.dtype) for item in work]
    if max_memory is not None and max(needs, default=0) > max_memory:
        largest = work[needs.index(max(needs))].operation.output.name
        raise PlanError(f"{largest!r} needs {max(needs):,} bytes at once; --max-memory allows {max_memory:,}")
    budget = _Budget(max(needs, default=0) * jobs if max_memory is None else max_memory)
    with ExitStack() as stack:
        reader = stack.enter_context(RangeReader(file for source in sources for file in source.files))
        files = stack.enter_context(_allocated(plan, directory))
        stack.enter_context(_one_thread_per_operation())
        worker = _Worker(reader, files, TORCH_DTYPE[plan.dtype], progress)
        pool = ThreadPoolExecutor(jobs, thread_name_prefix="merge")
        try:
            futures = [
                pool.submit(_within, budget, need, worker.run, item) for item, need in zip(work, needs, strict=True)
            ]
            _raise_first(futures)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _ranges(plan: MergePlan, chunk_elements: int) -> Iterator[_Range]:
    for operation in plan.operations:
        total = operation.output.elements
        whole = isinstance(operation, Upscale) and operation.rank is not None
        step = total if whole else chunk_elements
        for start in range(0, total, max(step, 1)):
            yield _Range(operation, start, min(step, total - start))


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


def _within(budget: _Budget, need: int, run: Callable[[_Range], None], item: _Range) -> None:
    with budget.holding(need):
        run(item)


def _raise_first(futures: list[Future[None]]) -> None:
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future in done and not future.cancelled() and (error := future.exception()) is not None:
            for other in futures:
                other.cancel()
            raise error


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
        elif operation.rank is None:
            self._upscale_dense(operation, item)
        else:
            self._upscale_low_rank(operation, item, operation.rank)
        if self.progress is not None:
            total = sum(source.nbytes for source in operation.sources)
            self.progress(total * item.count // max(operation.sources[0].elements, 1))

    def _copy(self, operation: Copy, item: _Range) -> None:
        values = self._read_stored(operation.source, item)
        _check_finite(values, operation.source)
        for other in operation.agreeing:
            if not torch.equal(self._read_stored(other, item).to(values.dtype), values):
                raise CheckpointError(f"{other.file}: the integer buffer {other.name!r} differs from the base's")
        self._write(operation, item, values)

    def _combine(self, operation: Combine, item: _Range) -> None:
        mixture = operation.mixture
        base = None if mixture.base is None else self._read(mixture.base, item)
        self._write(operation, item, mix(mixture, base, (self._read(source, item) for source in mixture.inputs)))

    def _upscale_dense(self, operation: Upscale, item: _Range) -> None:
        mixture, (target,) = operation.mixture, operation.vectors
        assert mixture.base is not None, "task vectors have a base"
        size = mixture.base.elements
        base = self._read(mixture.base, item)

        def inputs() -> Iterator[Tensor]:
            for k, source in enumerate(mixture.inputs):
                values = self._read(source, item)
                (vector,) = task_vectors(base, [values])
                self._store(target, k * size + item.start, vector)
                yield values

        self._write(operation, item, mix(mixture, base, inputs()))

    def _upscale_low_rank(self, operation: Upscale, item: _Range, rank: int) -> None:
        mixture, (down, up) = operation.mixture, operation.vectors
        assert mixture.base is not None, "task vectors have a base"
        base = self._read(mixture.base, item)

        def inputs() -> Iterator[Tensor]:
            for k, source in enumerate(mixture.inputs):
                values = self._read(source, item)
                (vector,) = task_vectors(base, [values])
                a, b = truncated_svd(vector.view(operation.output.shape), rank)
                self._store(down, k * a.numel(), a.reshape(-1))
                self._store(up, k * b.numel(), b.reshape(-1))
                yield values

        self._write(operation, item, mix(mixture, base, inputs()))

    def _read(self, source: Source, item: _Range) -> Tensor:
        values = self.reader.read_as(source, item.start, item.count, self.dtype)
        if not _is_finite(values):
            _check_finite(self._read_stored(source, item), source)
            raise CheckpointError(f"{source.file}: {source.name!r} does not fit the recipe's dtype; use dtype: float32")
        return values

    def _read_stored(self, source: Source, item: _Range) -> Tensor:
        """As it is stored; the sum of a base and an adapter is stored nowhere and has the arithmetic's dtype."""
        if isinstance(source, AdaptedTensor):
            return self.reader.read_as(source, item.start, item.count, self.dtype)
        return self.reader.read(source, item.start, item.count)

    def _write(self, operation: Operation, item: _Range, values: Tensor) -> None:
        self._store(operation.output, item.start, values)

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
