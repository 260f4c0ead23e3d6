"""A model on disk: its library, its configuration, and where each of its tensors lies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wemoe_plugin.checkpoints.containment import check_is_file, file_in, is_there
from wemoe_plugin.checkpoints.header import StoredTensor, read_header
from wemoe_plugin.checkpoints.sources import Source
from wemoe_plugin.checkpoints.torch_file import TORCH_SUFFIXES, read_torch_header
from wemoe_plugin.errors import CheckpointError

OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"
WEIGHT_NAMES: Mapping[str, str] = {"open_clip": "open_clip_model", "transformers": "model"}
"""The stem of the weights file each library looks for first."""

_CANDIDATES = {
    "open_clip": (
        *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
        *("open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin"),
    ),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors by name, known from headers alone.

    Attributes:
        path: the directory, or the one file.
        library: ``open_clip`` or ``transformers``; None for a lone file.
        config: the library's configuration; empty for a lone file.
        tensors: every tensor and where it lies, in natural order of their names.
        adapter: the PEFT adapter whose changes are part of the tensors, if there is one.
    """

    path: Path
    library: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, Source]
    adapter: Path | None = None


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a model directory (open_clip or transformers, one file or sharded) or of a lone file.

    Raises:
        CheckpointError: nothing is there, it is not a model, a shard is absent, or a file is damaged, is no file, or
            is a link out of the directory.
    """
    if not is_there(path):
        raise CheckpointError(f"{path}: no such directory or file")
    if not path.is_dir():
        check_is_file(path)
        if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
            raise CheckpointError(f"{path}: neither a safetensors file nor a torch file ({', '.join(TORCH_SUFFIXES)})")
        return Checkpoint(path, None, {}, _natural_order(_read_file(path)))
    if (found := file_in(path, OPEN_CLIP_CONFIG)) is not None:
        library, config = "open_clip", _read_json(found)
    elif (found := file_in(path, TRANSFORMERS_CONFIG)) is not None:
        library, config = "transformers", _read_json(found)
    elif (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path}: a PEFT adapter, not a model; name the model it is for, too: MODEL+{path.name}")
    else:
        raise CheckpointError(f"{path}: neither {TRANSFORMERS_CONFIG} (transformers) nor {OPEN_CLIP_CONFIG} is there")
    return Checkpoint(path, library, config, _natural_order(_find_tensors(path, library)))


def _natural_order(tensors: Mapping[str, StoredTensor]) -> dict[str, Source]:
    """By name, layer 2 before layer 10: the order of every table and report."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

    return {name: tensors[name] for name in sorted(tensors, key=key)}


def _find_tensors(directory: Path, library: str) -> dict[str, StoredTensor]:
    for name in _CANDIDATES[library]:
        if (found := file_in(directory, name)) is not None:
            return _read_file(found)
    for name in _INDEX:
        if (found := file_in(directory, name)) is not None:
            return _read_shards(found)
    others = sorted(p.name for p in directory.iterdir() if p.suffix in (".safetensors", *TORCH_SUFFIXES))
    cure = f"; there is {', '.join(others)}: name such a file itself as an expert" if others else ""
    expected = (*_CANDIDATES[library], *_INDEX) if library == "transformers" else _CANDIDATES[library]
    raise CheckpointError(f"{directory}: no weights: expected {' or '.join(expected)}{cure}")


def _read_file(path: Path) -> dict[str, StoredTensor]:
    return read_header(path) if path.suffix == ".safetensors" else read_torch_header(path)


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to files")
    tensors: dict[str, StoredTensor] = {}
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in weight_map.items():
        if shard not in headers:
            if Path(shard).name != shard:
                raise CheckpointError(f"{index}: the shard {shard!r} lies outside of the directory")
            if (found := file_in(index.parent, shard)) is None:
                raise CheckpointError(f"{index}: the shard {shard} is listed but absent")
            headers[shard] = _read_file(found)
        if name not in headers[shard]:
            raise CheckpointError(f"{index}: {name!r} is listed in {shard} but is not in that file")
        tensors[name] = headers[shard][name]
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path}: far too large for what it should hold")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not valid JSON") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data
