"""A forward pass without data or memory, to see what the modules of a model are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wemoe_plugin.modeling.config import RouterConfig
from wemoe_plugin.modeling.placement import PlacedModule
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
    problems: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    try:
        inputs = sample_inputs(model, _ROWS, generator)
    except Exception:
        return []
    raw = {id(value) for value in inputs.values()}
    texts_alone = all(value.ndim == 2 for value in inputs.values())

    def look(place: PlacedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, router = input_of(args, kwargs, place.argument), routers[place.config.router]
        if not isinstance(x, Tensor) or id(x) in raw or not x.is_floating_point() or x.shape[-1] != router.width:
            shape = f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            problems[place.path] = (
                f"{place.path} is given {shape}, not features of width {router.width}, which its router would read; "
                "match smaller modules inside of it, such as mlp"
            )
        elif texts_alone and router.routing == "sample" and x.shape[0] != _ROWS:
            problems[place.path] = (
                f"{place.path} is given {x.shape[0]} rows for {_ROWS} texts, so its router cannot decide for "
                "each text; match the module around it, or leave it to a static method"
            )

    hooks = [
        model.get_submodule(place.path).register_forward_pre_hook(partial(look, place), with_kwargs=True)
        for place in placed
    ]
    mode = model.training
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    except Exception:  # not every model runs without data; what was seen until then holds
        pass
    finally:
        model.train(mode)
        for hook in hooks:
            hook.remove()
    return list(problems.values())
