"""How much memory carrying out a plan takes, known beforehand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from wemoe_plugin.checkpoints.header import ITEM_BYTES, StoredTensor
from wemoe_plugin.checkpoints.sources import AdaptedTensor
from wemoe_plugin.merging.operations import Combine, Compress, Copy, Delegate, Operation
from wemoe_plugin.task_vectors.sampling import sample_size

CHUNK_ELEMENTS = 1 << 18
"""Elements per range: small enough that a range and its sums stay in a processor's cache."""

DEVICE_CHUNK_ELEMENTS = 1 << 22
"""Elements per range where a GPU computes: large enough that starting its kernels takes no time beside them."""


PROCESS_BYTES = {"numpy": 2_500_000, "torch": 13_000_000}
"""What threads, allocators and first calls take beside all buffers; ``benchmarks/merge_memory.py`` shows the sum."""

LAPACK_BYTES = 16_000_000
"""What the linear algebra library keeps for each thread that has decomposed a large matrix in float64."""


@dataclass(frozen=True)
class KernelMemory:
    """What a method's kernel holds beside its inputs, in tensors of an input's size.

    The highest of some straight lines in the number of experts, each (constant, per expert); decompositions add a
    line times the ratio of the matrix' sides. Measured by ``benchmarks/method_memory.py``.
    """

    lines: tuple[tuple[float, float], ...]
    square: tuple[float, float] = (0.0, 0.0)

    def tensors(self, experts: int, shape: tuple[int, ...]) -> float:
        """Tensors for so many experts and a tensor of some shape."""
        ratio = min(shape) / max(shape) if len(shape) == 2 and max(shape) else 0.0
        highest = max(constant + slope * experts for constant, slope in self.lines)
        return highest + ratio * (self.square[0] + self.square[1] * experts)


_CONSENSUS = (1.0, 3.25)

KERNELS: Mapping[str, KernelMemory] = {
    "iso_c": KernelMemory(((3.6, 1), (0, 2)), (3.4, 0)),
    "tsv_m": KernelMemory(((3, 2), (-1, 3.2)), (7.5, 0.4)),
    "ties": KernelMemory(((7, 1), _CONSENSUS)),
    "dare_linear": KernelMemory(((3, 1),)),
    "dare_ties": KernelMemory(((3, 1), _CONSENSUS)),
    "della": KernelMemory(((9, 1), _CONSENSUS)),
    "della_linear": KernelMemory(((9, 1),)),
    "breadcrumbs": KernelMemory(((6, 1),)),
    "breadcrumbs_ties": KernelMemory(((6, 1), _CONSENSUS)),
    "sce": KernelMemory(((7.5, 1), (2, 3.25))),
    "ram": KernelMemory(((5.5, 5.25),)),
    "ramplus_tl": KernelMemory(((5.5, 5.25),)),
    "model_stock": KernelMemory(((4, 1),)),
    "arcee_fusion": KernelMemory(((5, 0),)),
    "slerp": KernelMemory(((1.5, 0),)),
    "nearswap": KernelMemory(((5, 0),)),
    "nuslerp": KernelMemory(((6, 0),)),
    "multislerp": KernelMemory(((9, 1), (2, 4))),
    "karcher": KernelMemory(((5, 1),)),
    "passthrough": KernelMemory(((1, 0),)),
}


def operation_memory(operation: Operation, count: int, dtype: str) -> int:
    """Bytes one thread holds at once while it works on ``count`` elements of an operation.

    A plain range holds the base, one input and the sum in the arithmetic's dtype, and one range as stored. Where torch
    does it, the task vector, its product and the result as written come on top; an input with an adapter adds its
    change and its factors. For a task vector that is compressed see `compression_memory`. A method of mergekit's holds
    all its inputs and what its kernel makes of them.
    """
    width = ITEM_BYTES[dtype]
    if isinstance(operation, Delegate):
        inputs = len(operation.inputs)
        experts = inputs - (operation.base is not None)
        kernel = KERNELS[operation.method].tensors(experts, operation.output.shape)
        return int(count * ITEM_BYTES[operation.dtype] * (inputs + kernel))
    if isinstance(operation, Compress):
        return compression_memory(operation, dtype)
    stored = max((ITEM_BYTES[source.dtype] for source in operation.sources), default=0)
    if is_plain(operation, dtype):
        narrow = 8 if dtype == "F64" and stored < width else 0  # float32 between bfloat16 and float64, both ways
        return count * (stored + 3 * width + narrow)
    needed = count * (stored + 5 * width + ITEM_BYTES[operation.output.dtype])
    adapters = [source for source in operation.sources if isinstance(source, AdaptedTensor)]
    if adapters:
        needed += width * (2 * count + max(source.down.elements + source.up.elements for source in adapters))
    return needed


def compression_memory(operation: Compress, dtype: str) -> int:
    """Bytes that compressing one task vector takes at its worst moment, measured by ``benchmarks/merge_memory.py``.

    LoRA factors that are cut are taken apart in float64. All else has the task vector; the largest entries are
    found among pairs of a magnitude and a place, 16 bytes each; of a decomposition it depends on which way it goes.
    """
    width, rows, columns, size = ITEM_BYTES[dtype], *operation.output.shape, operation.size
    if (expert := operation.factors) is not None:
        return _factors_memory(expert, width, cut=size < expert.down.shape[0])
    elements = rows * columns
    if operation.form == "sparse":
        return max(_reading_memory(operation, width), elements * (2 * width + 16) + size * (width + 8))
    sample = sample_size((rows, columns), size)
    factors = 8 * size * (rows + columns)
    if sample is None:
        exact = 0 if width == 8 else 8 * elements
        small = min(rows, columns)
        # eigenvectors and what they are computed in; then an image under them, and its basis if that is the long side
        image = 8 * small * size + 8 * size * (rows if rows > columns else 2 * columns + size)
        forming = exact + max(32 * small * small, image) + min(LAPACK_BYTES, 72 * small * small)
    else:
        forming = (4 * elements if width == 8 else 0) + 20 * sample * (rows + columns)
    return max(_reading_memory(operation, width), elements * width + max(forming, elements * width + factors))


def spectrum_memory(operation: Compress, dtype: str) -> int:
    """Bytes that the singular values of one task vector take at their worst moment."""
    width, rows, columns = ITEM_BYTES[dtype], *operation.output.shape
    if (expert := operation.factors) is not None:
        return _factors_memory(expert, width, cut=True)
    exact = 0 if width == 8 else 8 * rows * columns
    small = min(rows, columns)
    gram = 18 * small * small + min(LAPACK_BYTES, 72 * small * small)
    return max(_reading_memory(operation, width), rows * columns * width + exact + gram)


def _reading_memory(operation: Compress, width: int) -> int:
    """Bytes until a dense task vector is there: base, expert and their difference, or the expert as it is stored."""
    base, expert = operation.base, operation.expert
    adapter = isinstance(expert, AdaptedTensor)
    stored = 0 if ITEM_BYTES[expert.dtype] == width else ITEM_BYTES[expert.dtype]
    needed = base.elements * max(3 * width, (3 if adapter else 2) * width + stored)
    if isinstance(expert, AdaptedTensor):
        needed += 2 * width * (expert.down.elements + expert.up.elements)
    return needed


def _factors_memory(expert: AdaptedTensor, width: int, cut: bool) -> int:
    """Bytes of LoRA factors, read and scaled; in float64 for their norm, or with orthonormal bases to cut them."""
    elements, rank = expert.down.elements + expert.up.elements, expert.down.shape[0]
    return elements * (2 * width + (22 if cut else 8)) + 64 * rank * rank


def piece_memory(operation: Operation, dtype: str, chunk_elements: int) -> int:
    """Bytes one thread holds for the largest piece of an operation: a range of it, or all of it."""
    elements = operation.output.elements
    return operation_memory(operation, elements if operation.whole else min(elements, chunk_elements), dtype)


def peak_memory(operations: tuple[Operation, ...], dtype: str, jobs: int, chunk_elements: int = CHUNK_ELEMENTS) -> int:
    """Bytes above the imported process at the worst moment: the ``jobs`` largest pieces of work at the same time."""
    needs = []
    for operation in operations:
        pieces = 1 if operation.whole else max(1, -(-operation.output.elements // chunk_elements))
        needs += [piece_memory(operation, dtype, chunk_elements)] * min(pieces, jobs)
    plain = all(is_plain(operation, dtype) for operation in operations)
    return sum(sorted(needs, reverse=True)[:jobs]) + PROCESS_BYTES["numpy" if plain else "torch"]


def fitting_chunk(operations: tuple[Operation, ...], dtype: str, chunk_elements: int, max_memory: int) -> int:
    """Elements per range, at most ``chunk_elements``, so that one elementwise range stays within ``max_memory``."""
    fitting = chunk_elements
    for operation in operations:
        if not operation.whole:
            fixed = operation_memory(operation, 0, dtype)  # such as the factors of an adapter
            each = operation_memory(operation, 1, dtype) - fixed
            fitting = min(fitting, (max_memory - fixed) // each)
    return max(1, fitting)


def is_plain(operation: Operation, dtype: str) -> bool:
    """Whether an operation needs no torch: elementwise, in float32 or float64, without float16 or adapters.

    numpy converts float16 several times slower than torch does.
    """
    return (
        isinstance(operation, Copy | Combine)
        and dtype in ("F32", "F64")
        and operation.output.dtype != "F16"
        and all(isinstance(source, StoredTensor) and source.dtype != "F16" for source in operation.sources)
    )


def available_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
