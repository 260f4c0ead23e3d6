"""``manifest.json``: what an output directory consists of, written last."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wemoe_plugin.checkpoints.staging import write_atomically
from wemoe_plugin.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
_PACKAGES = ("wemoe-plugin", "torch", "safetensors", "transformers", "open_clip_torch")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(directory: Path, about: dict[str, Any]) -> None:
    """Describe all files of a directory.

    Args:
        directory: whole but for its manifest.
        about: what else to say, such as where the recipe stood.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != MANIFEST_NAME)
    content = {**about, "packages": _versions(), "files": _describe(files)}
    write_atomically(directory / MANIFEST_NAME, (json.dumps(content, indent=2) + "\n").encode())


def refresh_manifest(directory: Path, names: Iterable[str]) -> None:
    """Describe some files anew after they were replaced or added."""
    content = read_manifest(directory)
    content["files"] |= _describe([directory / name for name in names])
    content["files"] = dict(sorted(content["files"].items()))
    write_atomically(directory / MANIFEST_NAME, (json.dumps(content, indent=2) + "\n").encode())


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest's content.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = directory / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{directory}: not an output of wemoe-merge: {MANIFEST_NAME} is absent") from None
    except ValueError:
        raise CheckpointError(f"{path}: not valid JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise CheckpointError(f"{path}: does not describe files")
    return content


def _describe(files: list[Path]) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256_of, files)
    return {p.name: {"bytes": p.stat().st_size, "sha256": d} for p, d in zip(files, digests, strict=True)}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
