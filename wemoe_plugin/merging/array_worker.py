"""Static merges by ranges with numpy alone: importing torch takes longer than merging a small model.

Results are those of `wemoe_plugin.merging.tensor_worker`, byte for byte. Each thread has its buffers once and for all,
so that a merge takes the same memory from its first range to its last.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from wemoe_plugin.checkpoints.header import FLOATS, StoredTensor
from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.checkpoints.sources import Source
from wemoe_plugin.merging.operations import Combine, Copy, Mixture, Operation
from wemoe_plugin.merging.problems import buffer_differs, does_not_fit, holds, too_large

Array = NDArray[np.generic]

_NUMPY_DTYPE: Mapping[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "BF16": np.uint16,  # its bits
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""What holds each of safetensors' element types."""

_BF16_INFINITY = 0x7F80


class _Buffers(threading.local):
    """The calling thread's buffers by their use; each grows to the largest range it has seen."""

    def __init__(self) -> None:
        self._held: dict[str, bytearray] = {}

    def array(self, use: str, count: int, dtype: type[np.generic]) -> Array:
        """An uninitialised array of ``count`` elements, valid until the same use is asked for again."""
        nbytes = count * np.dtype(dtype).itemsize
        if len(self._held.get(use, b"")) < nbytes:
            self._held[use] = bytearray(nbytes)
        return np.frombuffer(self._held[use], dtype, count)


class ArrayWorker:
    """Carries out copies and weighted sums of ranges."""

    def __init__(self, dtype: str, reader: RangeReader, files: Mapping[str, TensorFile]) -> None:
        self.dtype = _NUMPY_DTYPE[dtype]
        self.reader = reader
        self.files = files
        self.buffers = _Buffers()

    def run(self, operation: Operation, start: int, count: int) -> None:
        with np.errstate(all="ignore"):  # whatever is not finite is found at the end, and named
            if isinstance(operation, Copy):
                self._copy(operation, start, count)
            else:
                assert isinstance(operation, Combine)
                self._combine(operation, start, count)

    def _copy(self, operation: Copy, start: int, count: int) -> None:
        source, output = operation.source, operation.output
        stored = self._read(source, start, count, "copied")
        for other in operation.agreeing:
            if not np.array_equal(self._read(other, start, count, "stored").astype(np.int64), stored.astype(np.int64)):
                raise buffer_differs(other)
        if source.dtype != output.dtype:
            wide = _NUMPY_DTYPE["F64" if source.dtype == "F64" else "F32"]
            stored = self._decoded(source, start, count, "total", wide)
        self._store(operation, start, stored)

    def _combine(self, operation: Combine, start: int, count: int) -> None:
        self._store(operation, start, self._mixed(operation.mixture, start, count))

    def _mixed(self, mixture: Mixture, start: int, count: int) -> Array:
        """The arithmetic of `wemoe_plugin.merging.elementwise.mix`, in the same order."""
        base = None if mixture.base is None else self._decoded(mixture.base, start, count, "base", self.dtype)
        total: Array | None = None
        for source, weight in zip(mixture.inputs, mixture.weights, strict=True):
            values = self._decoded(source, start, count, "total" if total is None else "one", self.dtype)
            if base is not None:
                np.subtract(values, base, out=values)
            if weight != 1.0:
                np.multiply(values, weight, out=values)
            total = values if total is None else np.add(total, values, out=total)
        assert total is not None, "a mixture has at least one input"
        if mixture.divisor != 1.0:
            np.divide(total, mixture.divisor, out=total)
        if mixture.scale != 1.0:
            np.multiply(total, mixture.scale, out=total)
        return total if base is None else np.add(total, base, out=total)

    def _read(self, source: Source, start: int, count: int, use: str) -> Array:
        assert isinstance(source, StoredTensor), "adapters are no plain merges"
        stored = self.buffers.array(use, count, _NUMPY_DTYPE[source.dtype])
        self.reader.fill(source, start, stored.view(np.uint8).data)
        return stored

    def _decoded(self, source: Source, start: int, count: int, use: str, dtype: type[np.generic]) -> Array:
        """Elements in a floating-point dtype; read right into place where they are stored in it."""
        if _NUMPY_DTYPE[source.dtype] is dtype:
            return self._read(source, start, count, use)
        stored = self._read(source, start, count, "stored")
        target = self.buffers.array(use, count, dtype)
        if source.dtype == "BF16":
            narrow = target if dtype is np.float32 else self.buffers.array("narrow", count, np.float32)
            np.left_shift(stored, 16, out=narrow.view(np.uint32), dtype=np.uint32)
            stored = narrow
        if stored is not target:
            np.copyto(target, stored, casting="same_kind")
        return target

    def _rounded(self, values: Array, dtype: str) -> Array:
        """Values rounded to nearest, ties to even, as elements of an output's dtype; may reuse their buffer."""
        if _NUMPY_DTYPE[dtype] is values.dtype.type:
            return values
        if dtype != "BF16":
            target = self.buffers.array("rounded", values.size, _NUMPY_DTYPE[dtype])
            np.copyto(target, values, casting="same_kind")
            return target
        if values.dtype.type is np.float64:
            values = self._rounded(values, "F32")
        bits = values.view(np.uint32)
        shifted = self.buffers.array("one", values.size, np.uint32)
        np.right_shift(bits, 16, out=shifted)
        np.bitwise_and(shifted, 1, out=shifted)
        np.add(shifted, 0x7FFF, out=shifted)
        np.add(shifted, bits, out=shifted)
        np.right_shift(shifted, 16, out=shifted)
        target = self.buffers.array("stored", values.size, np.uint16)
        np.copyto(target, shifted, casting="same_kind")
        return target

    def _store(self, operation: Copy | Combine, start: int, values: Array) -> None:
        """Round and write; NaN must be seen before, since rounding its bits may make any number of them."""
        output = operation.output
        finite = values.dtype.kind != "f" or bool(np.isfinite(values).all())
        same = _NUMPY_DTYPE[output.dtype] is values.dtype.type
        stored = values if same or not finite else self._rounded(values, output.dtype)
        if not finite or not _is_finite(stored, output.dtype):
            self._blame(operation, start, stored.size)
        self.files[output.name].put(output.name, start, stored.view(np.uint8).data)

    def _blame(self, operation: Copy | Combine, start: int, count: int) -> None:
        """Say why a result is not finite: an input is not, or the sum or its rounding is too large."""
        for source in operation.sources:
            stored = self._read(source, start, count, "stored")
            if not _is_finite(stored, source.dtype):
                raise holds(source, self._has_nan(source, start, count))
            if not np.isfinite(self._decoded(source, start, count, "one", self.dtype)).all():
                raise does_not_fit(source)
        raise too_large(operation.output)

    def _has_nan(self, source: Source, start: int, count: int) -> bool:
        return bool(np.isnan(self._decoded(source, start, count, "one", np.float64)).any())


def _is_finite(stored: Array, dtype: str) -> bool:
    if dtype == "BF16":
        return int((stored & np.uint16(0x7FFF)).max(initial=0)) < _BF16_INFINITY
    return dtype not in FLOATS or bool(np.isfinite(stored).all())
