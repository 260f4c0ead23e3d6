"""Where in a model the modules of a configuration are, and whether they can be upscaled there."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn

from wemoe_plugin.checkpoints.conv1d import is_conv1d
from wemoe_plugin.checkpoints.module_names import live_names
from wemoe_plugin.modeling.config import LayerConfig, ModuleConfig, WemoeConfig


@dataclass(frozen=True)
class PlacedLayer:
    """A Linear layer: its path in the model, its name in the checkpoint, its configuration."""

    path: str
    name: str
    config: LayerConfig


@dataclass(frozen=True)
class PlacedModule:
    """A module to upscale.

    Attributes:
        path: in the model.
        config: of the module; of the first, where the model holds several of the checkpoint's modules in one.
        layers: its Linear layers.
        argument: which of its positional arguments the router reads.
    """

    path: str
    config: ModuleConfig
    layers: tuple[PlacedLayer, ...]
    argument: int


def place(model: nn.Module, config: WemoeConfig) -> tuple[list[PlacedModule], list[str]]:
    """Find the modules of a configuration in a model; looks at no weights.

    Modules that the library holds in one (ViT's ``intermediate`` and ``output`` are one ``mlp`` in transformers 5)
    become one, if one router decides for them.

    Returns:
        The modules, and what keeps others from being upscaled, one line each.
    """
    wanted = [_layer_name(module, layer) + ".weight" for module in config.modules for layer in module.layers]
    live = live_names(model, wanted)
    placed: dict[str, PlacedModule] = {}
    problems: list[str] = []
    for module in config.modules:
        missing = next((layer for layer in module.layers if f"{_layer_name(module, layer)}.weight" not in live), None)
        if missing is not None:
            problems.append(
                f"this {type(model).__name__} has no layer of its own for {_layer_name(module, missing)!r}: it is "
                "another model than the recipe's, or its library fuses what the files keep apart"
            )
            continue
        found = _place(module, live)
        if found is None:
            problems.append(f"the layers of {module.path} lie in different modules of this {type(model).__name__}")
        elif (trouble := _unfit(model, found)) is not None:
            problems.append(trouble)
        elif found.path not in placed:
            placed[found.path] = found
        elif _act_as_one(placed[found.path].config, module):
            earlier = placed[found.path]
            placed[found.path] = replace(earlier, layers=earlier.layers + found.layers)
        else:
            problems.append(
                f"{placed[found.path].config.path} and {module.path} are one module in this {type(model).__name__}, "
                "which has one router: match them together, by a keyword (mlp, attention) or by the module around both"
            )
    paths = set(placed)
    for path in sorted(paths):
        around = next((other for other in paths if path.startswith(f"{other}.")), None)
        if around is not None:
            problems.append(f"{path} lies inside {around}, which is upscaled too; upscale one")
    return list(placed.values()), problems


def _layer_name(module: ModuleConfig, layer: LayerConfig) -> str:
    return f"{module.path}.{layer.path}".rstrip(".")


def _place(module: ModuleConfig, live: dict[str, str]) -> PlacedModule | None:
    """The module in the model: by as many levels above its layers as in the checkpoint; None if they disagree.

    Where the library names layers otherwise it may have fewer levels: there it is the smallest module around them all.
    """
    layers = []
    paths = set()
    renamed = False
    for layer in module.layers:
        name = _layer_name(module, layer)
        path = live[f"{name}.weight"].removesuffix(".weight")
        renamed = renamed or not path.endswith(layer.path or path.rpartition(".")[2])
        paths.add(_above(path, layer.path.count(".") + 1 if layer.path else 0))
        layers.append(PlacedLayer(path, name, layer))
    if renamed:
        paths = {_around([layer.path for layer in layers])}
    if len(paths) != 1:
        return None
    return PlacedModule(paths.pop(), module, tuple(layers), 0 if renamed else module.argument)


def _above(path: str, levels: int) -> str:
    return ".".join(path.split(".")[:-levels]) if levels else path


def _around(paths: Sequence[str]) -> str:
    """The smallest module that holds all of these."""
    levels = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _unfit(model: nn.Module, placed: PlacedModule) -> str | None:
    if not placed.path:
        return f"{placed.config.path} is the whole {type(model).__name__}; match modules inside of it, such as mlp"
    if isinstance(model.get_submodule(placed.path), nn.ModuleList | nn.ModuleDict):
        members = (
            f"its members, {placed.path}.*" if placed.path == placed.config.path else "smaller modules inside of it"
        )
        return f"{placed.config.path} is a list of modules and has no forward pass; match {members}"
    if placed.argument and not _takes(model.get_submodule(placed.path), placed.argument + 1):
        return (
            f"{placed.path} is given its own input alone, not that of {placed.config.router}, which its router reads; "
            "leave it to a static method"
        )
    for layer in placed.layers:
        kind = model.get_submodule(layer.path)
        if not _is_plain_linear(kind):
            return f"{layer.path} is a {type(kind).__name__}, not a Linear layer of its own"
    return None


def _takes(module: nn.Module, count: int) -> bool:
    """Whether a module's forward pass takes so many positional arguments."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds for p in inspect.signature(module.forward).parameters.values()) >= count


def _act_as_one(first: ModuleConfig, second: ModuleConfig) -> bool:
    return first.router == second.router and first.lambdas == second.lambdas


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer's own forward pass applies its weight.

    The projection inside of nn.MultiheadAttention is a Linear layer that is never called.
    """
    linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return (linear and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)) or is_conv1d(module)
