"""The files beside the weights: configuration, tokenizer, preprocessor. The base's are copied to the output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from wemoe_plugin.checkpoints.checkpoint import TRANSFORMERS_CONFIG
from wemoe_plugin.checkpoints.containment import file_in
from wemoe_plugin.checkpoints.header import SAFETENSORS_DTYPE

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_OURS = (
    *("README.md", "manifest.json", "wemoe_config.json", "recipe.yaml", "tasks.yaml"),
    *("results.json", "report.html", "routing.svg"),
)

_TORCH_NAME = {stored: name for name, stored in SAFETENSORS_DTYPE.items()}


def find_companions(source: Path) -> list[Path]:
    """A model directory's small files; its folders, and whatever is neither file nor folder, are none of them.

    Raises:
        CheckpointError: one of them is a link out of the directory.
    """
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    kept = [n for n in names if not n.startswith(".") and n not in _OURS and not n.endswith(_WEIGHTS)]
    return [path for name in kept if (path := file_in(source, name)) is not None]


def copy_companions(source: Path, target: Path, dtype: str | None) -> None:
    """Copy a model directory's small files.

    Args:
        source: the base model's directory.
        target: the output directory.
        dtype: safetensors' name of what the weights are written in, entered in a transformers configuration.
    """
    for path in find_companions(source):
        shutil.copyfile(path, target / path.name)
    config = target / TRANSFORMERS_CONFIG
    if config.is_file() and dtype in _TORCH_NAME:
        _enter_dtype(config, _TORCH_NAME[dtype])


def _enter_dtype(config: Path, dtype: str) -> None:
    try:
        settings = json.loads(config.read_bytes())
    except (ValueError, RecursionError):  # beside an open_clip model it may be anything
        return
    if isinstance(settings, dict):
        entered = {key: dtype for key in ("dtype", "torch_dtype") if key in settings}
        config.write_text(json.dumps({**settings, **entered}, indent=2) + "\n", encoding="utf-8")
