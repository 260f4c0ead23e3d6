"""The safetensors header: what a file holds and where, read without touching a tensor.

The format is safetensors' own (https://huggingface.co/docs/safetensors): eight bytes of length, a JSON object, the
data. The library's reader maps whole files; merging reads ranges, so the header is parsed (and distrusted) here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wemoe_plugin.checkpoints.containment import check_is_file
from wemoe_plugin.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per element of the dtypes that can be merged or copied."""

SAFETENSORS_DTYPE = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""From the names torch, transformers and recipes use to safetensors'."""

MAX_AXES = 64
"""Axes of a tensor; torch's limit."""

MAX_NAME = 1_000
"""Characters of a tensor's name; the longest that libraries write have about 100."""

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Attributes:
        file: the safetensors file.
        name: its name there.
        dtype: safetensors' name of the element type, such as ``BF16``.
        shape: its axes, outermost first.
        offset: bytes from the start of the file to its first element.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


METADATA = "__metadata__"
"""The one name in a header that is no tensor's."""


def check_name(path: Path, name: object) -> None:
    """Refuse what cannot name a tensor in a safetensors file.

    Raises:
        CheckpointError: it is no text, cannot be written as UTF-8, is too long, or is the name of the metadata.
    """
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: a tensor is named by a {type(name).__name__}, not by a text")
    if name == METADATA or any("\ud800" <= c <= "\udfff" for c in name):
        raise CheckpointError(f"{path}: {name!r:.100} cannot be the name of a tensor")
    if len(name) > MAX_NAME:
        raise CheckpointError(f"{path}: a tensor's name has {len(name):,} characters, more than {MAX_NAME:,}")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        CheckpointError: the file is missing or truncated, or its header is not a valid one.
    """

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: not a whole safetensors file: {why}")

    check_is_file(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise refuse(f"it has {len(start)} bytes, the header alone needs 8")
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER:
                raise refuse(f"its header claims {length:,} bytes")
            if 8 + length > size:
                raise refuse(f"its header claims {length:,} bytes, the file has {size:,}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        raise refuse("its header is not JSON") from None
    if not isinstance(entries, dict):
        raise refuse("its header is not a JSON object")
    entries.pop(METADATA, None)

    tensors = [_entry(path, name, entry, 8 + length, refuse) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise refuse(f"the data of {tensor.name!r} does not begin where the tensor before it ends")
        end += tensor.nbytes
    if end != size:
        raise refuse(f"its tensors end at byte {end:,}, the file has {size:,} (truncated?)")
    return {tensor.name: tensor for tensor in tensors}


def _entry(path: Path, name: str, entry: Any, data_start: int, refuse: Any) -> StoredTensor:
    check_name(path, name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"the entry of {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: {name!r} has dtype {dtype!r:.100}; known: {', '.join(ITEM_BYTES)}")
    if not _natural(shape) or not _natural(offsets) or len(offsets) != 2 or len(shape) > MAX_AXES:
        raise refuse(f"the shape or offsets of {name!r} are not natural numbers")
    begin, end = offsets
    tensor = StoredTensor(path, name, dtype, tuple(shape), data_start + begin)
    if end - begin != tensor.nbytes:
        raise refuse(
            f"{name!r} of shape {shape} and {dtype} needs {tensor.nbytes:,} bytes, its offsets {end - begin:,}"
        )
    return tensor


def is_natural(value: object) -> bool:
    """Whether a value is a whole number from 0 that fits in 64 bits; True and 1.0 are not."""
    return type(value) is int and 0 <= value < 1 << 63


def _natural(values: Any) -> bool:
    return isinstance(values, list) and all(is_natural(v) for v in values)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that will hold these (name, dtype, shape), in this order, padded to 8 bytes."""
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
