"""Put task vectors and routers into a model that holds the static weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from wemoe_plugin.checkpoints.containment import file_in
from wemoe_plugin.checkpoints.conv1d import is_conv1d
from wemoe_plugin.checkpoints.staging import write_atomically
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.modeling.composition import WORKING_BYTES
from wemoe_plugin.modeling.config import ROUTERS_NAME, WemoeConfig, read_config
from wemoe_plugin.modeling.ensembled_linear import EnsembledLinear, Routing
from wemoe_plugin.modeling.forms import DenseForm, Form, LowRankForm, SparseForm
from wemoe_plugin.modeling.placement import PlacedLayer, PlacedModule, place
from wemoe_plugin.modeling.router import Router
from wemoe_plugin.modeling.sequence import SequenceState, watch
from wemoe_plugin.modeling.stored import check_indices, stored_vectors
from wemoe_plugin.modeling.wemoe import WeightEnsemblingMoE, wemoe_modules


def attach(model: nn.Module, path: Path | str, working_bytes: int = WORKING_BYTES) -> nn.Module:
    """Upscale a model in place with the task vectors and routers of an output directory.

    Args:
        model: built by you, holding the directory's static weights.
        path: the directory.
        working_bytes: the most that the composed weights of one layer take at a time, for dense and sparse forms.

    Returns:
        The same model; the modules that the recipe upscaled are `WeightEnsemblingMoE` now.

    Raises:
        CheckpointError: files are absent or damaged, or the model does not have the modules they are for.
    """
    directory = Path(path)
    if next(wemoe_modules(model), None) is not None:
        raise CheckpointError(f"this {type(model).__name__} is upscaled already; attach once")
    config = read_config(directory)
    placed, problems = place(model, config)
    if problems:
        raise CheckpointError("\n".join(problems[:3]))
    stored_vectors(directory, config)  # looks at headers before anything is loaded
    vectors: dict[str, Tensor] = {}
    for name in config.vector_files:
        vectors |= _load(directory / name)
    routers = load_routers(directory, config)
    experts, states = len(config.experts), dict[str, SequenceState]()
    forms = [{layer.path: _form(model, layer, vectors, experts, working_bytes) for layer in m.layers} for m in placed]
    for module, own in zip(placed, forms, strict=True):  # nothing can fail any more: it is attached whole or not at all
        router = routers[module.config.router]
        state = None if router.per_token else watch(model, module.path, states)
        _replace(model, module, own, router, state)
    return model


def _replace(
    model: nn.Module, placed: PlacedModule, forms: Mapping[str, Form], router: Router, sequence: SequenceState | None
) -> None:
    """Put a wrapper in the place of a module, and layers with task vectors inside of it."""
    module, routing = model.get_submodule(placed.path), Routing()
    for path, form in forms.items():
        replacement = EnsembledLinear(form, routing)
        replacement.train(module.training)
        if path == placed.path:
            module = replacement
        else:
            model.set_submodule(path, replacement)
    like = forms[placed.layers[0].path].weight  # of the layer that reads the module's input
    router.to(like.device, like.dtype)
    wrapper = WeightEnsemblingMoE(
        module,
        router,
        placed.config.lambdas,
        routing,
        sequence,
        placed.argument,
        placed.path,
        placed.config.router,
    )
    wrapper.to(like.device).train(module.training)
    model.set_submodule(placed.path, wrapper)


def _form(model: nn.Module, placed: PlacedLayer, vectors: dict[str, Tensor], experts: int, working_bytes: int) -> Form:
    """The static weights of a layer with its task vectors, which are taken out of ``vectors``: no copy is kept."""
    linear = model.get_submodule(placed.path)
    layer, weight, bias = placed.config, linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    rows, columns = weight.shape  # as they are stored
    device, dtype = weight.device, weight.dtype

    def take(end: str, *shape: int) -> Tensor:
        key = f"{placed.name}.{end}"
        if key not in vectors:
            raise CheckpointError(f"the task vectors {key!r} are not in the directory")
        found = vectors.pop(key)
        if found.shape != shape:
            raise CheckpointError(f"{key!r} has shape {list(found.shape)}, the model needs {list(shape)}")
        return found.to(device, dtype if found.is_floating_point() else None)

    transposed = is_conv1d(linear)
    if transposed:
        weight = weight.T.contiguous()
    biases = take("bias.task_vectors", experts, len(weight)) if layer.bias else None
    kept = "weight.task_vectors"
    if layer.form == "dense":
        dense = take(kept, experts, rows, columns)
        return DenseForm(weight, bias, dense.mT if transposed else dense, biases, working_bytes)
    if layer.form == "sparse":
        values = take(f"{kept}.values", experts, layer.count or 0)
        indices = take(f"{kept}.indices", experts, layer.count or 0)
        check_indices(indices, rows * columns, f"{placed.name}.{kept}.indices")
        if transposed:
            moved = indices % columns * rows + indices // columns
            indices, order = moved.sort(dim=1)
            values = values.gather(1, order)
        return SparseForm(weight, bias, values, indices, biases, working_bytes)
    ranks = layer.ranks or ()
    down, up = take(f"{kept}.down", sum(ranks), columns), take(f"{kept}.up", sum(ranks), rows)
    if transposed:
        down, up = up, down
    return LowRankForm(weight, bias, down, up, ranks, biases)


def load_routers(directory: Path, config: WemoeConfig) -> dict[str, Router]:
    """The directory's routers by name."""
    tensors = _load(directory / ROUTERS_NAME)
    routers = {}
    for name, spec in config.routers.items():
        own = {key.removeprefix(f"{name}:"): value for key, value in tensors.items() if key.startswith(f"{name}:")}
        with torch.device("meta"):  # no memory is taken for what a configuration claims
            router = Router(spec.width, len(config.experts), spec.depth, per_token=spec.routing == "token")
        wanted = {key: value.shape for key, value in router.state_dict().items()}
        floats = all(value.is_floating_point() for value in own.values())
        if {key: value.shape for key, value in own.items()} != wanted or not floats:
            what = "has another shape than its configuration" if own else "is absent"
            raise CheckpointError(f"{directory / ROUTERS_NAME}: the router {name!r} {what}")
        router = router.to_empty(device="cpu")
        router.load_state_dict(own)
        routers[name] = router
    return routers


def write_routers(directory: Path, routers: dict[str, Router]) -> None:
    """Write ``routers.safetensors`` in one step."""
    state = {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for name, r in routers.items()
        for key, value in r.state_dict().items()
    }
    write_atomically(directory / ROUTERS_NAME, save(state, {"format": "pt"}))


def routers_of(model: nn.Module) -> dict[str, Router]:
    """The routers inside an attached model, by the names its directory gives them."""
    return {module.router_name: module.router for _, module in wemoe_modules(model)}


def _load(path: Path) -> dict[str, Tensor]:
    if file_in(path.parent, path.name) is None:
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
