"""Put task vectors and routers into a model that holds the static weights."""

from __future__ import annotations

from pathlib import Path
from typing import TypeGuard

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from wemoe_plugin.checkpoints.containment import file_in
from wemoe_plugin.checkpoints.staging import write_atomically
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.modeling.config import ROUTERS_NAME, LayerConfig, ModuleConfig, WemoeConfig, read_config
from wemoe_plugin.modeling.ensembled_linear import EnsembledLinear, Routing
from wemoe_plugin.modeling.router import Router
from wemoe_plugin.modeling.wemoe import WeightEnsemblingMoE, wemoe_modules


def attach(model: nn.Module, path: Path | str) -> nn.Module:
    """Upscale a model in place with the task vectors and routers of an output directory.

    Args:
        model: built by you, holding the directory's static weights.
        path: the directory.

    Returns:
        The same model; the modules that the recipe upscaled are `WeightEnsemblingMoE` now.

    Raises:
        CheckpointError: files are absent or damaged, or the model does not have the modules they are for.
    """
    directory = Path(path)
    config = read_config(directory)
    vectors: dict[str, Tensor] = {}
    for name in config.vector_files:
        vectors |= _load(directory / name)
    routers = load_routers(directory, config)
    for module_config in config.modules:
        attach_module(model, module_config, vectors, routers[module_config.router])
    return model


def attach_module(model: nn.Module, config: ModuleConfig, vectors: dict[str, Tensor], router: Router) -> None:
    """Upscale one module of a model in place.

    Args:
        model: any torch model.
        config: the module.
        vectors: task vectors by the names `wemoe_plugin.merging.upscaling` gives them.
        router: shared by all modules that are attached with it.
    """
    path = _find(model, config.path)
    module = model.get_submodule(path)
    if isinstance(module, WeightEnsemblingMoE):
        raise CheckpointError(f"{path} is upscaled already; attach once")
    routing = Routing()
    for layer in config.layers:
        linear = module.get_submodule(layer.path) if layer.path else module
        where = f"{path}.{layer.path}".rstrip(".")
        if not is_plain_linear(linear):
            raise CheckpointError(f"{where} is a {type(linear).__name__} in this model, not a Linear layer of its own")
        replacement = _ensemble(
            linear, layer, f"{config.path}.{layer.path}".rstrip("."), vectors, routing, len(config.lambdas)
        )
        if layer.path:
            model.set_submodule(f"{path}.{layer.path}", replacement)
        else:
            module = replacement
    like = next(module.parameters())
    router.to(like.device, like.dtype)
    wrapper = WeightEnsemblingMoE(module, router, config.lambdas, routing).to(like.device)
    wrapper.train(module.training)
    model.set_submodule(path, wrapper)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer's own forward pass applies its weight.

    The projection inside of nn.MultiheadAttention is a Linear layer that is never called.
    """
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


def misplaced_layers(model: nn.Module, config: WemoeConfig) -> list[str]:
    """What keeps `attach` from upscaling a model, one line each; looks at no weights."""
    problems = []
    for module in config.modules:
        try:
            path = _find(model, module.path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if isinstance(model.get_submodule(path), nn.ModuleList | nn.ModuleDict):
            problems.append(f"{path} is a list of modules and has no forward pass; match its members, {path}.*")
            continue
        for layer in module.layers:
            where = f"{path}.{layer.path}".rstrip(".")
            kind = model.get_submodule(where)
            if not is_plain_linear(kind):
                problems.append(f"{where} is a {type(kind).__name__}, not a Linear layer of its own")
    return problems


def _ensemble(
    linear: nn.Linear, layer: LayerConfig, name: str, vectors: dict[str, Tensor], routing: Routing, experts: int
) -> EnsembledLinear:
    rows, columns = linear.weight.shape

    def take(key: str, *shape: int) -> Tensor:
        if key not in vectors:
            raise CheckpointError(f"the task vectors {key!r} are not in the directory")
        if vectors[key].shape != shape:
            raise CheckpointError(f"{key!r} has shape {list(vectors[key].shape)}, the model needs {list(shape)}")
        return vectors[key].to(linear.weight.device, linear.weight.dtype)

    dense, factors = None, None
    if layer.form == "dense":
        dense = take(f"{name}.weight.task_vectors", experts, rows, columns)
    else:
        rank = layer.rank or 0
        factors = (
            take(f"{name}.weight.task_vectors.A", experts, rank, columns),
            take(f"{name}.weight.task_vectors.B", experts, rows, rank),
        )
    biases = take(f"{name}.bias.task_vectors", experts, rows) if layer.bias else None
    return EnsembledLinear(linear, routing, dense, factors, biases)


def _find(model: nn.Module, path: str) -> str:
    """The module's path in this model: libraries may drop or add an outer name between files and modules."""
    prefix = getattr(model, "base_model_prefix", "")
    known = {name for name, _ in model.named_modules()}
    candidates = [path, path.partition(".")[2], *([f"{prefix}.{path}"] if prefix else [])]
    for candidate in candidates:
        if candidate in known:
            return candidate
    raise CheckpointError(
        f"this {type(model).__name__} has no module {path!r}: it is another model than the recipe's, or "
        "its library names modules otherwise than files do, which cannot be upscaled yet"
    )


def load_routers(directory: Path, config: WemoeConfig) -> dict[str, Router]:
    """The directory's routers by name."""
    tensors = _load(directory / ROUTERS_NAME)
    routers = {}
    for name, spec in config.routers.items():
        router = Router(spec.width, len(config.experts), spec.depth)
        own = {key.removeprefix(f"{name}:"): value for key, value in tensors.items() if key.startswith(f"{name}:")}
        try:
            router.load_state_dict(own)
        except RuntimeError:
            what = "has another shape than its configuration" if own else "is absent"
            raise CheckpointError(f"{directory / ROUTERS_NAME}: the router {name!r} {what}") from None
        routers[name] = router
    return routers


def save_routers(directory: Path, routers: dict[str, Router]) -> None:
    """Write ``routers.safetensors`` in one step."""
    state = {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for name, r in routers.items()
        for key, value in r.state_dict().items()
    }
    write_atomically(directory / ROUTERS_NAME, save(state, {"format": "pt"}))


def routers_of(model: nn.Module, config: WemoeConfig) -> dict[str, Router]:
    """The routers inside an attached model, by the names its directory gives them."""
    by_path = {path: module.router for path, module in wemoe_modules(model)}
    return {module.router: by_path[_find(model, module.path)] for module in config.modules}


def _load(path: Path) -> dict[str, Tensor]:
    if file_in(path.parent, path.name) is None:
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
