"""Recipes that mergekit carries out as a whole: those that stack layers, or make a tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wemoe_plugin.errors import RecipeError
from wemoe_plugin.recipe.paths import resolve_path
from wemoe_plugin.recipe.yaml_source import Location, YamlSource, read_yaml

WHOLE_KEYS = ("slices", "modules", "tokenizer_source", "tokenizer", "chat_template")
"""Keys of mergekit recipes that concern more than tensors of one name."""

_OURS = ("rules", "tasks", "tuning")
_REFERENCES = ("model", "base_model", "path", "lora", "tokenizer_source", "source")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class WholeRecipe:
    """A recipe for mergekit.

    Attributes:
        path: the recipe file.
        text: what is in it.
        data: its values, local models under absolute paths.
        keys: those of `WHOLE_KEYS` that it has.
        models: every model it names, in order.
    """

    path: Path
    text: str
    data: dict[str, Any]
    keys: tuple[str, ...]
    models: tuple[str, ...]


def read_whole_recipe(path: Path, fallback: Path = Path()) -> WholeRecipe | None:
    """The recipe if it is one for mergekit, else None.

    Args:
        path: the recipe.
        fallback: where relative paths start if nothing is there from the recipe's own folder.

    Raises:
        RecipeError: it cannot be read, mixes mergekit's parts with ours, or names a local model that is not there.
    """
    source = read_yaml(path)
    if not isinstance(source.data, dict):
        return None
    keys = tuple(key for key in WHOLE_KEYS if source.data.get(key) is not None)
    if not keys:
        return None
    problems = [
        f"{source.where((key,))}: {key} cannot stand beside {keys[0]}: mergekit carries out such a recipe as a whole"
        for key in _OURS
        if key in source.data
    ]
    models: dict[str, None] = {}
    data = dict(source.data)
    for place, text in list(_references(source.data, ())):
        parts = [_resolved(part, path.parent, fallback) for part in text.split("+")]
        resolved = "+".join(parts)
        there = [os.path.lexists(part) or os.path.lexists(part.rpartition("@")[0]) for part in parts]
        if not all(found or _HUB_ID.fullmatch(part) for found, part in zip(there, parts, strict=True)):
            problems.append(f"{source.where(place)}: {text!r}: no such directory or file")
        if place[-1] in ("model", "base_model"):
            models[resolved] = None
        data = _replaced(data, place, resolved if place[-1] in ("path", "lora") else _reference(parts))
    if problems:
        raise RecipeError("\n".join(problems))
    return WholeRecipe(path, _text(source), data, keys, tuple(models))


def _reference(parts: list[str]) -> dict[str, Any]:
    """mergekit's own form of a model, which it does not take apart again at signs that may be part of a path."""
    paths = []
    for part in parts:
        name, _, revision = (part, "", "") if os.path.lexists(part) else part.partition("@")
        paths.append({"path": name, **({"revision": revision} if revision else {})})
    return {"model": paths[0], **({"lora": paths[1]} if len(paths) > 1 else {})}


def _text(source: YamlSource) -> str:
    return source.path.read_text(encoding="utf-8")


def _references(value: Any, place: Location) -> Iterator[tuple[Location, str]]:
    """Every model a document names, and where."""
    if isinstance(value, dict):
        for key, item in value.items():
            named = key in _REFERENCES and isinstance(item, str)
            if named and not (key in ("tokenizer_source", "source") and item in ("union", "base")):
                yield (*place, key), item
            else:
                yield from _references(item, (*place, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _references(item, (*place, i))


def _resolved(part: str, directory: Path, fallback: Path) -> str:
    name, mark, revision = part.partition("@")
    found = resolve_path(name, directory, fallback)
    return f"{found.resolve()}{mark}{revision}" if name and os.path.lexists(found) else part


def _replaced(value: Any, place: Location, new: Any) -> Any:
    if not place:
        return new
    copied: Any = dict(value) if isinstance(value, dict) else list(value)
    copied[place[0]] = _replaced(value[place[0]], place[1:], new)
    return copied
