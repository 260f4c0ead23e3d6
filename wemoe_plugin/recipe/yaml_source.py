"""Read YAML into plain values and remember the line of every one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wemoe_plugin.errors import RecipeError

Location = tuple[str | int, ...]
"""Keys and indices from the top of a document, such as ``("rules", 1, "match")``."""

MAX_VALUES = 100_000
"""More values than this in one document (aliases counted each time they are used) are refused."""

MAX_BYTES = 1_000_000
"""A file larger than this is no recipe and is not parsed, which takes about a second per 100 kB."""

MAX_DEPTH = 50
"""Values nested more deeply than this are refused."""

_MAX_NUMBER = 100
"""Characters of a number; YAML's base-60 numbers would otherwise take quadratic time."""

_YAML_TAGS = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class YamlSource:
    """One YAML document.

    Attributes:
        path: the file it came from, as messages show it.
        data: its plain values.
        lines: the 1-based line of the key (or list item) at every location.
    """

    path: Path
    data: Any
    lines: Mapping[Location, int]

    def where(self, location: Location) -> str:
        """``path:line`` of the innermost known part of a location."""
        for length in range(len(location), -1, -1):
            if location[:length] in self.lines:
                return f"{self.path}:{self.lines[location[:length]]}"
        return str(self.path)


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads ``1e-3`` as a number, as YAML 1.2 and every user expect."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    f"{_YAML_TAGS}float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> YamlSource:
    """Read one YAML file.

    Raises:
        RecipeError: the file is missing, is not text, is not one YAML document, uses tags that build objects,
            repeats a key, or is too large once its aliases are followed.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise RecipeError(f"{path}: is a pipe, a socket or a device, not a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError(f"{path}: has more than {MAX_BYTES:,} bytes; a recipe is a short text")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a directory; name the recipe file in it") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name that no file can have
        raise RecipeError(f"{path}: cannot be read as text: {error}") from None
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            reader = _Reader(path, loader)
            value = reader.value(node, ()) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply") from None
    return YamlSource(path, value, reader.lines)


class _Reader:
    """Turns a node tree into values, noting lines on the way."""

    def __init__(self, path: Path, loader: yaml.SafeLoader) -> None:
        self.path = path
        self.loader = loader
        self.lines: dict[Location, int] = {}
        self.count = 0

    def value(self, node: yaml.Node, location: Location) -> Any:
        self._count(node)
        line = node.start_mark.line + 1
        if len(location) > MAX_DEPTH:
            raise RecipeError(f"{self.path}:{line}: nested too deeply")
        if not node.tag.startswith(_YAML_TAGS) or ":python/" in node.tag:
            raise RecipeError(f"{self.path}:{line}: the tag {node.tag!r} is not allowed; use plain values")
        self.lines.setdefault(location, line)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, location)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*location, i)) for i, item in enumerate(node.value)]
        if len(node.value) > _MAX_NUMBER and node.tag in (f"{_YAML_TAGS}int", f"{_YAML_TAGS}float"):
            raise RecipeError(f"{self.path}:{line}: a number has {len(node.value):,} characters")
        if node.tag in (f"{_YAML_TAGS}timestamp", f"{_YAML_TAGS}binary"):
            return node.value
        try:
            return self.loader.construct_object(node)
        except (ValueError, LookupError, ArithmeticError) as error:  # such as !!int ""
            raise RecipeError(
                f"{self.path}:{line}: {node.value!r} is not a {node.tag.rpartition(':')[2]}: {error}"
            ) from None

    def _count(self, node: yaml.Node) -> None:
        self.count += 1
        if self.count > MAX_VALUES:
            line = node.start_mark.line + 1
            raise RecipeError(f"{self.path}:{line}: more than {MAX_VALUES:,} values once aliases are followed")

    def _pairs(self, node: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """The pairs of a mapping, and of those it merges in with ``<<``."""
        self._count(node)
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{self.path}:{node.start_mark.line + 1}: << takes a mapping or a list of mappings")
        for key, value in node.value:
            if key.tag != f"{_YAML_TAGS}merge":
                yield key, value
                continue
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from self._pairs(merged)

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in self._pairs(node):
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{self.path}:{line}: a key must be a plain word")
            key = key_node.value
            if key in result:
                raise RecipeError(f"{self.path}:{line}: the key {key!r} stands twice")
            place = (*location, key)
            self.lines[place] = line
            result[key] = self.value(value_node, place)
        return result
