"""A forward pass without data or memory, to see what the modules of a model are given."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.modeling.config import RouterConfig
from wemoe_plugin.modeling.placement import PlacedLayer, PlacedModule
from wemoe_plugin.modeling.samples import sample_inputs
from wemoe_plugin.modeling.wemoe import input_of

_ROWS = 2


def what_routers_cannot_read(
    model: nn.Module, placed: Iterable[PlacedModule], routers: Mapping[str, RouterConfig]
) -> list[str]:
    """Modules that are given something else than features of their router's width, or parts of texts as rows.

    Args:
        model: on the meta device.
        placed: the modules to upscale.
        routers: by name.

    Returns:
        One line each; nothing for modules that the pass does not reach, or if the model cannot be run without data.
    """
    try:
        inputs = sample_inputs(model, _ROWS, torch.Generator().manual_seed(0))
    except CheckpointError:
        return []
    given = [inputs]
    if "input_ids" in inputs and "attention_mask" in inspect.signature(model.forward).parameters:
        given.append({**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})
    trial = _Trial(inputs, routers)
    hooks = [hook for place in placed for hook in trial.watch(model, place)]
    mode = model.training
    try:
        for each in given:  # without data none can say what a mask holds; some models ask, with a mask or without
            with suppress(Exception), torch.no_grad():
                model.eval()(**each)
                break
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    return list(trial.problems.values())


class _Trial:
    """What is seen of modules and their layers while a model runs."""

    def __init__(self, inputs: Mapping[str, Tensor], routers: Mapping[str, RouterConfig]) -> None:
        self.raw = {id(value) for value in inputs.values()}
        self.texts_alone = all(value.ndim == 2 for value in inputs.values())
        self.routers = routers
        self.rows: dict[str, int] = {}  # that a module is given, while it runs
        self.problems: dict[str, str] = {}

    def watch(self, model: nn.Module, place: PlacedModule) -> Iterable[RemovableHandle]:
        """Hooks on a module and its layers."""
        module = model.get_submodule(place.path)
        yield module.register_forward_pre_hook(partial(self._begin, place), with_kwargs=True)
        for layer in place.layers:
            yield model.get_submodule(layer.path).register_forward_pre_hook(partial(self._layer, place, layer))
        yield module.register_forward_hook(partial(self._end, place), always_call=True)

    def _begin(self, place: PlacedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, router = input_of(args, kwargs, place.argument), self.routers[place.config.router]
        if not isinstance(x, Tensor) or id(x) in self.raw or not x.is_floating_point() or x.shape[-1] != router.width:
            shape = f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            self.problems[place.path] = (
                f"{place.path} is given {shape}, not features of width {router.width}, which its router would read; "
                "match smaller modules inside of it, such as mlp"
            )
        elif self.texts_alone and router.routing == "sample" and x.shape[0] != _ROWS:
            self.problems[place.path] = (
                f"{place.path} is given {x.shape[0]} rows for {_ROWS} texts, so its router cannot decide for "
                "each text; match the module around it, or leave it to a static method"
            )
        else:
            self.rows[place.path] = x.shape[0]

    def _end(self, place: PlacedModule, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.rows.pop(place.path, None)

    def _layer(self, place: PlacedModule, layer: PlacedLayer, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = self.rows.get(place.path)
        if rows is not None and args and isinstance(args[0], Tensor) and args[0].shape[0] != rows:
            self.problems[place.path] = (
                f"{layer.path} is given {args[0].shape[0]} rows where {place.path} is given {rows}: it mixes batch and "
                "tokens on the way, and its weights cannot be decided per sample; leave it to a static method"
            )
