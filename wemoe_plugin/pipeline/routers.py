"""Keep what was learned: an attached model's routers in its directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from wemoe_plugin.checkpoints.manifest import read_manifest, refresh_manifest
from wemoe_plugin.checkpoints.staging import write_atomically
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.merging.card import with_scores
from wemoe_plugin.modeling.attach import load_routers, routers_of, write_routers
from wemoe_plugin.modeling.config import ROUTERS_NAME, read_config
from wemoe_plugin.pipeline.evaluate import RESULT_NAMES


def save_routers(model: nn.Module, path: Path | str) -> None:
    """Rewrite ``routers.safetensors`` of an output directory; results of its earlier routers are removed.

    Args:
        model: made of this directory by `wemoe_plugin.load_model` or `wemoe_plugin.attach`.
        path: the directory.

    Raises:
        CheckpointError: the directory is no output with upscaled modules, or the model's routers are not of it.
    """
    directory = Path(path)
    read_manifest(directory)  # before anything is changed
    routers, kept = routers_of(model), load_routers(directory, read_config(directory))
    if _shapes(routers) != _shapes(kept):
        raise CheckpointError(f"{directory}: this {type(model).__name__} does not have the routers of this directory")
    write_routers(directory, routers)
    changed = [ROUTERS_NAME]
    for name in RESULT_NAMES:  # they were those of other routers
        (directory / name).unlink(missing_ok=True)
    card = directory / "README.md"
    if card.is_file():
        write_atomically(card, with_scores(card.read_text(encoding="utf-8"), None).encode())
        changed.append(card.name)
    refresh_manifest(directory, changed)


def _shapes(routers: Mapping[str, nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        name: {key: tuple(value.shape) for key, value in router.state_dict().items()}
        for name, router in routers.items()
    }
