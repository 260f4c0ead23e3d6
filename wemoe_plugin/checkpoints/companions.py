"""The files beside the weights: configuration, tokenizer, preprocessor. The base's are copied to the output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from wemoe_plugin.checkpoints.checkpoint import TRANSFORMERS_CONFIG
from wemoe_plugin.checkpoints.header import SAFETENSORS_DTYPE

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_OURS = (
    *("README.md", "manifest.json", "wemoe_config.json", "recipe.yaml", "tasks.yaml"),
    *("results.json", "report.html", "routing.svg"),
)

_TORCH_NAME = {stored: name for name, stored in SAFETENSORS_DTYPE.items()}


def copy_companions(source: Path, target: Path, dtype: str | None) -> None:
    """Copy a model directory's small files.

    Args:
        source: the base model's directory.
        target: the output directory.
        dtype: safetensors' name of what the weights are written in, entered in a transformers configuration.
    """
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and not path.name.startswith(".")
            and path.name not in _OURS
            and not path.name.endswith(_WEIGHTS)
        ):
            shutil.copyfile(path, target / path.name)
    config = target / TRANSFORMERS_CONFIG
    if config.is_file() and dtype in _TORCH_NAME:
        settings = json.loads(config.read_text(encoding="utf-8"))
        for key in ("dtype", "torch_dtype"):
            if key in settings:
                settings[key] = _TORCH_NAME[dtype]
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
