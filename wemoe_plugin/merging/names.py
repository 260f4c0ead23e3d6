"""What can be told from the names of tensors: their depth in the network, and what a mistaken pattern meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from wemoe_plugin.recipe.patterns import KEYWORDS, module_of


def relative_depths(tensor_names: Iterable[str]) -> dict[str, float]:
    """The place of each tensor in its stack of layers, from 0 (first layer) to 1 (last), for gradients.

    Outside of a stack everything is at 0, and the layer of a stack of one is at 1, as in mergekit.
    """
    numbered = re.compile(r"^(.*?)\.(\d+)\.")
    places: dict[str, tuple[str, int] | None] = {}
    last: dict[str, int] = {}
    for name in tensor_names:
        match = numbered.match(name)
        places[name] = (match[1], int(match[2])) if match else None
        if match:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    depths = {}
    for name, place in places.items():
        if place is None:
            depths[name] = 0.0
        else:
            depths[name] = place[1] / last[place[0]] if last[place[0]] else 1.0
    return depths


def nearest_modules(globs: Iterable[str], tensor_names: Iterable[str]) -> str | None:
    """The module path (numbers as ``*``) that looks most like what a rule asked for."""
    paths: dict[str, None] = {}
    for name in tensor_names:
        path = module_of(name)
        while path:
            paths[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)] = None
            path = module_of(path)
    for glob in globs:
        wanted = re.sub(r"\[\d+-\d+\]", "*", glob)
        if wanted.lower() in KEYWORDS:
            return wanted.lower()
        lasts = {path.rpartition(".")[2] for path in paths}
        last = difflib.get_close_matches(wanted.rpartition(".")[2], lasts, 1, 0.6)
        alike = [path for path in paths if last and path.rpartition(".")[2] == last[0]]
        near = difflib.get_close_matches(wanted, alike, 1, 0.0) or difflib.get_close_matches(wanted, paths, 1, 0.5)
        if near:
            return near[0]
    return None
