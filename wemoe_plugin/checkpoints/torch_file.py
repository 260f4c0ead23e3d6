"""Torch files (``.bin``, ``.pt``, ``.ckpt``) read like safetensors: where each tensor lies, without loading any.

``torch.save`` writes a zip archive whose records are stored, not compressed, so every tensor has a place in the file.
The archive's pickle says which; it is read by an unpickler that knows the few names a state dict is made of and calls
nothing else, so a file cannot run code, and torch need not be imported. The unpickler is Python's own in Python: the
one in C lets a pickle of ten bytes take gigabytes, and objects be changed behind their constructors.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from wemoe_plugin.checkpoints.containment import check_is_file
from wemoe_plugin.checkpoints.header import ITEM_BYTES, MAX_AXES, StoredTensor, check_name, is_natural
from wemoe_plugin.errors import CheckpointError

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "params")
_MAX_PICKLE = 100_000_000


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _TensorRecord:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Opaque:
    """Stands for a value of a class that is not a tensor: it takes whatever a pickle does to it, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Opaque:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    append = extend = add = __call__


def read_torch_header(path: Path, *, opaque: bool = False) -> dict[str, StoredTensor]:
    """The tensors of a torch file by name, in the order of the state dict.

    A state dict nested under ``state_dict`` or the like is found, and ``module.`` before every name is taken away.

    Args:
        path: a file that ``torch.save`` wrote, torch 1.6 or later.
        opaque: let objects that are no tensors stand as empty shells; without it a file that holds any is refused.

    Raises:
        CheckpointError: it is no such file, is damaged, needs code to be loaded, or holds tensors that are views.
    """
    check_is_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(path, archive, opaque)
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: not a torch file of version 1.6 or later (or truncated); load it with the program that wrote it "
            "and save it as safetensors"
        ) from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # zipfile raises anything for a damaged archive, down to struct.error
        raise CheckpointError(f"{path}: its archive is damaged: {_short(error)}") from None


def _short(error: Exception) -> str:
    return repr(str(error) or type(error).__name__)[1:-1][:200]


def _read_archive(path: Path, archive: zipfile.ZipFile, opaque: bool) -> dict[str, StoredTensor]:
    records = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote")
    root = pickles[0].removesuffix("data.pkl")
    if records[pickles[0]].file_size > _MAX_PICKLE:
        raise CheckpointError(f"{path}: its pickle is far too large for a state dict")
    if f"{root}constants.pkl" in records:
        raise CheckpointError(f"{path}: a TorchScript archive, not a state dict; save its state_dict as safetensors")
    order = b"little"
    if (info := records.get(f"{root}byteorder")) is not None:
        order = archive.read(info) if info.file_size <= 10 else b""
    if order != b"little":
        raise CheckpointError(f"{path}: its numbers are not little-endian")
    try:
        value = _StateDictUnpickler(io.BytesIO(archive.read(pickles[0])), path, opaque).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{path}: its pickle is damaged: {_short(error)}") from None
    tensors = {}
    with path.open("rb") as file:
        for name, record in _state_dict(path, value).items():
            tensors[name] = _locate(path, name, record, records, root, file)
    return _without_module(tensors)


def _state_dict(path: Path, value: Any) -> dict[str, _TensorRecord]:
    for _ in range(3):
        if not isinstance(value, dict):
            break
        found = {name: item for name, item in value.items() if isinstance(item, _TensorRecord)}
        if found:
            for name in found:
                check_name(path, name)
            return found
        value = next((value[name] for name in _WRAPPERS if isinstance(value.get(name), dict)), None)
    raise CheckpointError(f"{path}: holds no state dict (names to tensors, alone or under {', '.join(_WRAPPERS)})")


def _locate(
    path: Path, name: str, record: _TensorRecord, records: Mapping[str, zipfile.ZipInfo], root: str, file: Any
) -> StoredTensor:
    storage = record.storage
    info = records.get(f"{root}data/{storage.key}")
    if info is None:
        raise CheckpointError(f"{path}: the data of {name!r} is absent")
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: its data is compressed; save it again with torch.save")
    expected, step = [], 1
    for axis in reversed(record.shape):
        expected.append(step)
        step *= axis
    contiguous = all(a == b or n == 1 for a, b, n in zip(record.stride, reversed(expected), record.shape, strict=True))
    if not contiguous and step:
        raise CheckpointError(f"{path}: {name!r} is a view with stride {list(record.stride)}; save a copy of it")
    width = ITEM_BYTES[storage.dtype]
    if (record.offset + step) * width > info.file_size:  # of an empty tensor the place, at least
        raise CheckpointError(f"{path}: the data of {name!r} is shorter than its shape")
    # The local header may be longer than the central one says: its own lengths count.
    size = file.seek(0, io.SEEK_END)
    file.seek(min(max(info.header_offset, 0), size))
    local = file.read(30)
    start = info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if local[:4] != b"PK\x03\x04" or start + (record.offset + step) * width > size:
        raise CheckpointError(f"{path}: the archive is damaged at {name!r}")
    return StoredTensor(path, name, storage.dtype, record.shape, start + record.offset * width)


def _without_module(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names as they were before ``DataParallel`` put ``module.`` in front of all of them."""
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _TensorRecord:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    if len(shape) != len(stride) or len(shape) > MAX_AXES:
        raise pickle.UnpicklingError("a tensor whose shape and strides do not go together")
    if not all(is_natural(n) for n in (offset, *shape, *stride)):
        raise pickle.UnpicklingError("a tensor whose numbers are not natural")
    return _TensorRecord(storage, offset, tuple(shape), tuple(stride))


def _rebuild_dict() -> dict[Any, Any]:
    return {}


def _rebuild_size(axes: Any) -> tuple[Any, ...]:
    if len(axes) > MAX_AXES:
        raise pickle.UnpicklingError("a shape with too many axes")
    return tuple(axes)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _rebuild_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): _rebuild_size,
}


_HASHED = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(0, None, 2),
    pickle.DICT: slice(0, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}
"""Opcodes that hash values, and where those lie on the stack."""


def _with_flat_keys(load: Callable[..., None], keys: slice) -> Callable[..., None]:
    """An opcode's work, for keys that can be hashed: a tuple nested a million deep would end the process."""

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[keys]:
            if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
                raise pickle.UnpicklingError("a key of nested tuples")
        load(unpickler)

    return checked


class _StateDictUnpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # it takes as much memory as it claims to need
    dispatch.update({op[0]: _with_flat_keys(pickle._Unpickler.dispatch[op[0]], keys) for op, keys in _HASHED.items()})

    def __init__(self, file: io.BytesIO, path: Path, opaque: bool) -> None:
        super().__init__(file)
        self.path = path
        self.opaque = opaque

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if self.opaque:
            return _Opaque
        raise CheckpointError(
            f"{self.path}: needs {module}.{name} to be loaded, and a checkpoint must not run code; "
            f"wemoe-merge convert {self.path} DIR reads its tensors and nothing else"
        )

    def load_build(self) -> None:
        """Leave out the attributes an object is given beside its content, such as a state dict's ``_metadata``."""
        self.stack.pop()  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a reference that is no storage")
        if not isinstance(pid[1], str) or pid[1] not in ITEM_BYTES or not isinstance(pid[2], str):
            raise pickle.UnpicklingError("a reference that is no storage")
        return _Storage(pid[1], pid[2])
