"""Every operation with torch: task vectors, decompositions, adapters, mergekit's methods, other devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.checkpoints.sources import Source
from wemoe_plugin.checkpoints.tensors import TORCH_DTYPE, read_as, read_stored, write
from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.elementwise import mix, task_vectors
from wemoe_plugin.merging.operations import Combine, Copy, Delegate, Operation, OutputTensor, Upscale
from wemoe_plugin.merging.problems import buffer_differs, does_not_fit, holds, too_large
from wemoe_plugin.task_vectors.low_rank import truncated_svd


class TensorWorker:
    """Carries out any operation.

    Args:
        dtype: of the arithmetic, a safetensors name.
        device: of the arithmetic, a name of torch's.
        reader: of all sources.
        files: where each tensor is stored, by its name.
    """

    def __init__(self, dtype: str, device: str, reader: RangeReader, files: Mapping[str, TensorFile]) -> None:
        self.dtype = TORCH_DTYPE[dtype]
        self.device = torch.device(device)
        self.reader = reader
        self.files = files

    @torch.inference_mode()
    def run(self, operation: Operation, start: int, count: int) -> None:
        if isinstance(operation, Copy):
            self._copy(operation, start, count)
        elif isinstance(operation, Combine):
            self._combine(operation, start, count)
        elif isinstance(operation, Upscale):
            self._upscale(operation, start, count)
        else:
            self._delegate(operation)

    def _copy(self, operation: Copy, start: int, count: int) -> None:
        values = self._read_stored(operation.source, start, count)
        _check_finite(values, operation.source)
        for other in operation.agreeing:
            if not torch.equal(self._read_stored(other, start, count).long(), values.long()):
                raise buffer_differs(other)
        self._store(operation.output, start, values)

    def _combine(self, operation: Combine, start: int, count: int) -> None:
        mixture = operation.mixture
        base = None if mixture.base is None else self._read(mixture.base, start, count)
        values = mix(mixture, base, (self._read(source, start, count) for source in mixture.inputs))
        self._store(operation.output, start, values)

    def _upscale(self, operation: Upscale, start: int, count: int) -> None:
        mixture = operation.mixture
        assert mixture.base is not None, "task vectors have a base"
        base = self._read(mixture.base, start, count)

        def inputs() -> Iterator[Tensor]:
            for k, source in enumerate(mixture.inputs):
                values = self._read(source, start, count)
                (vector,) = task_vectors(base, [values])
                self._store_vector(operation, start, k, vector)
                yield values

        self._store(operation.output, start, mix(mixture, base, inputs()))

    def _store_vector(self, operation: Upscale, start: int, k: int, vector: Tensor) -> None:
        """Keep a range of expert k's task vector, or the factors of the whole of it."""
        if operation.rank is None:
            (target,) = operation.vectors
            self._store(target, k * operation.output.elements + start, vector)
            return
        factors = truncated_svd(vector.view(operation.output.shape), operation.rank)
        for target, factor in zip(operation.vectors, factors, strict=True):
            self._store(target, k * factor.numel(), factor.reshape(-1))

    def _delegate(self, operation: Delegate) -> None:
        from wemoe_plugin.merging.mergekit_bridge import merge_tensors

        shape, count = operation.output.shape or (1,), operation.output.elements
        dtype = TORCH_DTYPE[operation.dtype]
        tensors = [self._read(source, 0, count, dtype).view(shape) for source in operation.inputs]
        try:
            merged = merge_tensors(operation, tensors)
        except Exception as error:  # kernels raise anything
            raise PlanError(f"{operation.output.name!r} cannot be merged by {operation.method}: {error}") from error
        self._store(operation.output, 0, merged.reshape(-1))

    def _read(self, source: Source, start: int, count: int, dtype: torch.dtype | None = None) -> Tensor:
        values = read_as(self.reader, source, start, count, dtype or self.dtype)
        if not _is_finite(values):
            _check_finite(self._read_stored(source, start, count), source)
            raise does_not_fit(source)
        return values.to(self.device)

    def _read_stored(self, source: Source, start: int, count: int) -> Tensor:
        return read_stored(self.reader, source, start, count, self.dtype)

    def _store(self, output: OutputTensor, start: int, values: Tensor) -> None:
        rounded = values.to(TORCH_DTYPE[output.dtype])
        if not _is_finite(rounded):
            raise too_large(output)
        write(self.files[output.name], output.name, start, rounded)


def _is_finite(values: Tensor) -> bool:
    """A finite sum shows finite values in one pass; only a suspicious one is looked at again."""
    if not values.is_floating_point() or torch.isfinite(values.sum(dtype=torch.float64)):
        return True
    return bool(torch.isfinite(values).all())


def _check_finite(values: Tensor, source: Source) -> None:
    if not _is_finite(values):
        raise holds(source, bool(torch.isnan(values).any()))
