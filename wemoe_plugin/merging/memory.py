"""How much memory carrying out a plan takes, known beforehand."""

from __future__ import annotations

import os

from wemoe_plugin.checkpoints.header import ITEM_BYTES
from wemoe_plugin.checkpoints.sources import AdaptedTensor
from wemoe_plugin.merging.operations import Delegate, Operation, Upscale

CHUNK_ELEMENTS = 1 << 18
"""Elements per range: small enough that a range and its sums stay in a processor's cache."""


def operation_memory(operation: Operation, count: int, dtype: str) -> int:
    """Bytes one thread holds at once while it works on ``count`` elements of an operation.

    An elementwise range holds one input as stored and the base, one input, its task vector, its product and the sum
    in the arithmetic's dtype, and the result as written. An input with an adapter adds its change and its factors, a
    low-rank range what its decomposition takes.
    """
    stored = max((ITEM_BYTES[source.dtype] for source in operation.sources), default=0)
    width = ITEM_BYTES[dtype]
    needed = count * (stored + 5 * width + ITEM_BYTES[operation.output.dtype])
    adapters = [source for source in operation.sources if isinstance(source, AdaptedTensor)]
    if adapters:
        needed += width * (2 * count + max(source.down.elements + source.up.elements for source in adapters))
    if isinstance(operation, Delegate):
        return needed + count * delegate_bytes(operation, width)
    if isinstance(operation, Upscale) and operation.rank is not None:
        out_features, in_features = operation.output.shape
        small = min(out_features, in_features)
        needed += 8 * (count + 5 * small * small + operation.rank * (out_features + in_features))
    return needed


def delegate_bytes(operation: Delegate, width: int) -> int:
    """Bytes per element that a method holds beside what reading and writing take.

    All inputs at once, and what its kernel makes of them: see `benchmarks/merge_memory.py` for what was measured.
    """
    inputs = len(operation.inputs)
    return width * (4 * inputs + 2) + 24


def piece_memory(operation: Operation, dtype: str, chunk_elements: int) -> int:
    """Bytes one thread holds for the largest piece of an operation: a range of it, or all of it."""
    elements = operation.output.elements
    return operation_memory(operation, elements if operation.whole else min(elements, chunk_elements), dtype)


def peak_memory(operations: tuple[Operation, ...], dtype: str, jobs: int, chunk_elements: int = CHUNK_ELEMENTS) -> int:
    """Bytes of buffers at the worst moment: the ``jobs`` largest pieces of work at the same time."""
    needs = []
    for operation in operations:
        pieces = 1 if operation.whole else max(1, -(-operation.output.elements // chunk_elements))
        needs += [piece_memory(operation, dtype, chunk_elements)] * min(pieces, jobs)
    return sum(sorted(needs, reverse=True)[:jobs])


def fitting_chunk(operations: tuple[Operation, ...], dtype: str, chunk_elements: int, max_memory: int) -> int:
    """Elements per range, at most ``chunk_elements``, so that one elementwise range stays within ``max_memory``."""
    widest = max((operation_memory(o, 1, dtype) for o in operations if not o.whole), default=1)
    return max(1, min(chunk_elements, max_memory // widest))


def available_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
