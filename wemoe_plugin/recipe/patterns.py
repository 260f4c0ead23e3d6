"""Which tensors a rule claims: keywords, and globs over dotted names."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

_MLP_LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "fc1 fc2",  # transformers CLIP, timm
        "c_fc c_proj",  # open_clip, GPT-2
        "gate_proj up_proj down_proj",  # Llama, Mistral, Qwen
        "gate_up_proj down_proj",  # Phi-3
        "up_proj down_proj",
        "wi wo",  # T5
        "wi_0 wi_1 wo",  # T5 v1.1, Flan-T5
        "w1 w2 w3",  # Llama as Meta ships it, DINOv2 SwiGLU as timm ships it
        "w12 w3",
        "lin1 lin2",  # DistilBERT
        "dense_h_to_4h dense_4h_to_h",  # GPT-NeoX
    )
)
_ATTENTION_LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "q_proj k_proj v_proj",
        "q k v",
        "query key value",
        "q_lin k_lin v_lin",
        "qkv proj",
        "c_attn c_proj",
        "in_proj_weight",
    )
)
KEYWORDS = ("mlp", "attention")
"""Words a rule may match by instead of a glob."""


def module_of(tensor_name: str) -> str:
    """The dotted path of the module a tensor belongs to."""
    return tensor_name.rpartition(".")[0]


def find_modules(keyword: str, tensor_names: Iterable[str]) -> list[str]:
    """Paths of the MLPs or attention blocks of a network, found from the names of its tensors.

    An MLP is a module whose tensors all lie in its own layers and which has all the layers of one known family
    (``fc1`` and ``fc2``, ``gate_proj``, ``up_proj`` and ``down_proj``, ...); an attention block likewise. In BERT and
    its kin an MLP is two modules, ``intermediate`` and ``output``, and an attention block is the module around
    ``self`` (ViT's ``attention``) and ``output``.
    """
    children: dict[str, set[str]] = {}
    deep: set[str] = set()
    for name in tensor_names:
        parts = name.split(".")
        for length in range(len(parts)):
            prefix = ".".join(parts[:length])
            children.setdefault(prefix, set()).add(parts[length])
            if len(parts) - length > 2:
                deep.add(prefix)
    families = _MLP_LAYERS if keyword == "mlp" else _ATTENTION_LAYERS
    modules = [p for p, found in children.items() if p and p not in deep and any(f <= found for f in families)]
    if keyword == "mlp":
        for path in children:
            if (half := first_half(path, children)) is not None:
                modules += [half, path]
        return modules
    return [around if f"{(around := module_of(path))}.output.dense" in children else path for path in modules]


def first_half(path: str, known: Container[str]) -> str | None:
    """The ``intermediate`` beside an ``output``, the two halves of an MLP in BERT and its kin; None for other paths.

    Args:
        path: of a module.
        known: names of tensors, or of modules.
    """
    outer, _, last = path.rpartition(".")
    half = f"{outer}.intermediate"
    if last != "output" or not any(f"{half}.dense{end}" in known for end in ("", ".weight")):
        return None
    return half if any(f"{path}.dense{end}" in known for end in ("", ".weight")) else None


@dataclass(frozen=True)
class Pattern:
    """What a rule's ``match`` says: one keyword or one or more globs.

    In a glob ``*`` stands for (part of) one dotted component, ``**`` for any number of them, ``[0-5]`` for the
    numbers of a range. A glob names a tensor, or a module and everything in it.
    """

    globs: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.globs)

    def claims(self, tensor_names: Iterable[str]) -> Mapping[str, str]:
        """Tensors the pattern matches, each with the path it matched by: its own name or a module around it."""
        names = list(tensor_names)
        found: dict[str, str] = {}
        for glob in self.globs:
            if glob in KEYWORDS:
                modules = set(find_modules(glob, names))
                for name in names:
                    if (module := _enclosing(name, modules)) is not None:
                        found.setdefault(name, module)
            else:
                expression = glob_expression(glob)
                for name in names:
                    if (path := _shortest_prefix(name, expression)) is not None:
                        found.setdefault(name, path)
        return found


def _enclosing(name: str, modules: set[str]) -> str | None:
    path = module_of(name)
    while path:
        if path in modules:
            return path
        path = module_of(path)
    return None


def _shortest_prefix(name: str, expression: re.Pattern[str]) -> str | None:
    end = name.find(".")
    while end != -1:
        if expression.fullmatch(name, 0, end):
            return name[:end]
        end = name.find(".", end + 1)
    return name if expression.fullmatch(name) else None


def glob_expression(glob: str) -> re.Pattern[str]:
    """The regular expression of a glob over dotted names.

    Raises:
        ValueError: an empty component, or brackets that do not hold a range of numbers.
    """
    components = glob.split(".")
    if any(not c for c in components):
        raise ValueError(f"{glob!r} has an empty component")
    pieces: list[str] = []
    for i, component in enumerate(components):
        last = i == len(components) - 1
        if component == "**":
            pieces.append(r"[^.]+(?:\.[^.]+)*" if last else r"(?:[^.]+\.)*")
        else:
            pieces.append(_component_expression(component, glob) + ("" if last else r"\."))
    return re.compile("".join(pieces))


def _component_expression(component: str, glob: str) -> str:
    if component == "*":
        return "[^.]+"
    pieces = []
    for piece in re.split(r"(\*|\[[^\]]*\])", component):
        if piece == "*":
            pieces.append("[^.]*")
        elif piece.startswith("["):
            bounds = re.fullmatch(r"\[(\d{1,6})-(\d{1,6})\]", piece)
            if bounds is None or int(bounds[2]) < int(bounds[1]) or int(bounds[2]) - int(bounds[1]) > 10_000:
                raise ValueError(f"{piece} in {glob!r} is not a range of numbers such as [0-5]")
            pieces.append("(?:" + "|".join(str(n) for n in range(int(bounds[1]), int(bounds[2]) + 1)) + ")")
        else:
            if "[" in piece or "]" in piece:
                raise ValueError(f"{glob!r} has a bracket without its other half")
            pieces.append(re.escape(piece))
    return "".join(pieces)
