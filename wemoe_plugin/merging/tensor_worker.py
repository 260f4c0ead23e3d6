"""Every operation with torch: task vectors, decompositions, adapters, mergekit's methods, other devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.checkpoints.sources import AdaptedTensor, Source
from wemoe_plugin.checkpoints.tensors import TORCH_DTYPE, read_as, read_factors, read_stored, write
from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.elementwise import mix, task_vectors
from wemoe_plugin.merging.memory import CHUNK_ELEMENTS
from wemoe_plugin.merging.operations import Combine, Compress, Copy, Delegate, Operation, OutputTensor, Upscale
from wemoe_plugin.merging.problems import buffer_differs, does_not_fit, holds, too_large
from wemoe_plugin.task_vectors.low_rank import (
    product_norm,
    singular_values,
    singular_values_of_product,
    truncated_product,
    truncated_svd,
)
from wemoe_plugin.task_vectors.sparse import largest


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
        elif isinstance(operation, Compress):
            self._compress(operation)
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
                self._store(operation.vectors, k * operation.output.elements + start, vector)
                yield values

        self._store(operation.output, start, mix(mixture, base, inputs()))

    def _compress(self, operation: Compress) -> None:
        first, second, norms = self.compressed(operation)
        for part, at, values in zip(operation.parts, operation.starts, (first, second), strict=True):
            self._store(part, at, values.reshape(-1))
        self._store(operation.norms, 2 * operation.place, norms)

    @torch.inference_mode()
    def compressed(self, operation: Compress) -> tuple[Tensor, Tensor, Tensor]:
        """Both parts of an expert's compressed task vector, and [‖τ‖, ‖what is dropped‖]."""
        if (expert := operation.factors) is not None:
            down, up = self._factors(expert)
            kept = truncated_product(down, up, operation.size)
            whole = product_norm(down, up)
            if operation.size >= down.shape[0]:
                return *kept, torch.stack([whole, torch.zeros_like(whole)])
            rest = product_norm(torch.cat([down, kept[0]]), torch.cat([up, -kept[1]]))
            return *kept, torch.stack([whole, rest])
        matrix = self._task_vector(operation)
        if operation.form == "sparse":
            values, indices = largest(matrix, operation.size)
            whole, kept_norm = _norm(matrix), _norm(values)
            return values, indices, torch.stack([whole, (whole.square() - kept_norm.square()).clamp_min(0).sqrt()])
        down, up = truncated_svd(matrix, operation.size)
        rest = torch.addmm(matrix, up.T.to(matrix.dtype), down.to(matrix.dtype), alpha=-1)
        return down, up, torch.stack([_norm(matrix), _norm(rest)])

    @torch.inference_mode()
    def singular_values(self, operation: Compress) -> Tensor:
        """Those of the whole task vector, descending, float64 on the CPU."""
        if (expert := operation.factors) is not None:
            return singular_values_of_product(*self._factors(expert)).cpu()
        return singular_values(self._task_vector(operation)).cpu()

    def _task_vector(self, operation: Compress) -> Tensor:
        count = operation.output.elements
        (vector,) = task_vectors(self._read(operation.base, 0, count), [self._read(operation.expert, 0, count)])
        if not _is_finite(vector):
            raise too_large(operation.parts[0])
        return vector.view(operation.output.shape)

    def _factors(self, expert: AdaptedTensor) -> tuple[Tensor, Tensor]:
        factors = read_factors(self.reader, expert, self.dtype)
        for source, factor in zip((expert.down, expert.up), factors, strict=True):
            _check_finite(factor, source)
        return factors[0].to(self.device), factors[1].to(self.device)

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


def _norm(values: Tensor) -> Tensor:
    """‖values‖ (Frobenius), a float64 scalar; by parts, since torch copies what it adds up in another dtype."""
    parts = torch.split(values.reshape(-1), CHUNK_ELEMENTS)
    whole: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(p, dtype=torch.float64) for p in parts])
    )
    return whole


def _is_finite(values: Tensor) -> bool:
    """The extremes show it in one pass and without a copy: NaN is among them if it is anywhere."""
    if not values.is_floating_point() or not values.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in values.aminmax())


def _check_finite(values: Tensor, source: Source) -> None:
    if not _is_finite(values):
        raise holds(source, bool(torch.isnan(values).any()))
