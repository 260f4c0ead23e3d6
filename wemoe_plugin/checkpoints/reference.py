"""How a recipe names a model: a directory, a file, a hub id, ``model@revision``, ``model+adapter``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from wemoe_plugin.checkpoints.adapter import apply_adapter
from wemoe_plugin.checkpoints.checkpoint import Checkpoint, open_checkpoint
from wemoe_plugin.checkpoints.containment import is_there
from wemoe_plugin.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def open_reference(text: str, resolve: Callable[[str], Path]) -> Checkpoint:
    """The checkpoint a recipe names, its adapter applied; from the hub or its local cache if it is no local path.

    Args:
        text: what the recipe says.
        resolve: from a relative path to where it would lie.

    Raises:
        CheckpointError: it is not there, is damaged, or the adapter does not fit.
    """
    if is_there(resolve(text)) or "+" not in text:
        return open_checkpoint(_find(text, resolve))
    model, _, adapter = text.rpartition("+")
    return apply_adapter(open_checkpoint(_find(model, resolve)), _find(adapter, resolve))


def _find(text: str, resolve: Callable[[str], Path]) -> Path:
    path = resolve(text)
    if is_there(path):
        return path
    name, _, revision = text.partition("@")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{path}: no such directory or file")
    return _from_hub(name, revision or None, path)


def _from_hub(name: str, revision: str | None, path: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL_FILES, "*.safetensors"]))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL_FILES, "*.bin", "*.pt"]))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{path}: no such directory or file; {name} is not in the hub's local cache, and the hub cannot be reached"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: no such directory or file, and the hub has no {name}: {first}") from None
    return found
