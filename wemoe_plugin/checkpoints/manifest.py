"""``manifest.json``: what an output directory consists of, written last."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wemoe_plugin.checkpoints.staging import write_atomically
from wemoe_plugin.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
_WRITER = "wemoe-plugin"
_PACKAGES = ("wemoe-plugin", "torch", "numpy", "safetensors", "mergekit", "transformers", "open_clip_torch")


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
    names = sorted(_entries(directory) - {MANIFEST_NAME})
    content = {"written_by": _WRITER, **about, "packages": package_versions(), "files": _describe(directory, names)}
    write_atomically(directory / MANIFEST_NAME, (json.dumps(content, indent=2) + "\n").encode())


def refresh_manifest(directory: Path, names: Iterable[str]) -> None:
    """Describe some files anew after they were replaced or added, and forget those that are gone."""
    content = read_manifest(directory)
    present = {name for name in content["files"] if (directory / name).is_file()}
    kept = {name: entry for name, entry in content["files"].items() if name in present}
    content["files"] = dict(sorted((kept | _describe(directory, names)).items()))
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


def doubt_output(directory: Path) -> str | None:
    """Why a directory is not, or not only, an output of ours; None if it is."""
    try:
        content = read_manifest(directory)
    except CheckpointError:
        return f"this has no {MANIFEST_NAME} of ours"
    if content.get("written_by") != _WRITER:
        return f"its {MANIFEST_NAME} is not ours"
    others = unlisted(directory, content["files"])
    return f"this holds {others[0]} as well" if others else None


def unlisted(directory: Path, files: Collection[str]) -> list[str]:
    """What a directory holds beside its manifest and the files that this names."""
    return sorted(_entries(directory) - set(files) - {MANIFEST_NAME})


def _entries(directory: Path) -> set[str]:
    """Files, links and empty directories below a directory, relative to it."""
    found = set()
    for path in directory.rglob("*"):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            found.add(path.relative_to(directory).as_posix())
    return found


def _describe(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    names = list(names)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256_of, [directory / name for name in names])
    sizes = [(directory / name).stat().st_size for name in names]
    return {n: {"bytes": size, "sha256": d} for n, size, d in zip(names, sizes, digests, strict=True)}


def package_versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
