"""What an output directory holds, from its configuration and the headers of its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wemoe_plugin.checkpoints.checkpoint import open_checkpoint
from wemoe_plugin.checkpoints.containment import file_in
from wemoe_plugin.checkpoints.header import StoredTensor, read_header
from wemoe_plugin.checkpoints.manifest import read_manifest
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.modeling.config import CONFIG_NAME, ROUTERS_NAME, ModuleConfig, WemoeConfig, read_config


@dataclass(frozen=True)
class ModuleOverview:
    """An upscaled module: parameters and bytes of its own weights and of its task vectors, by form."""

    path: str
    form: str
    router: str
    lambdas: tuple[float, ...]
    static_parameters: int
    vector_parameters: int
    vector_bytes: int


@dataclass(frozen=True)
class Overview:
    """An output directory.

    Attributes:
        library: which one builds the model.
        experts: their names; empty for a static merge.
        parameters: of the ordinary checkpoint.
        nbytes: of the ordinary checkpoint.
        modules: the upscaled ones.
        router_parameters: of all routers together, in ``routers.safetensors``.
    """

    library: str
    experts: tuple[str, ...]
    parameters: int
    nbytes: int
    modules: tuple[ModuleOverview, ...]
    router_parameters: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "modules": [vars(module) for module in self.modules]}


def read_overview(directory: Path) -> Overview:
    """Look into an output directory; no tensor is read.

    Raises:
        CheckpointError: it is none, or is damaged.
    """
    read_manifest(directory)
    checkpoint = open_checkpoint(directory)
    parameters = sum(tensor.elements for tensor in checkpoint.tensors.values())
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    library = checkpoint.library or "none"
    if not (directory / CONFIG_NAME).is_file():
        return Overview(library, (), parameters, nbytes, (), 0)
    config = read_config(directory)
    vectors: dict[str, StoredTensor] = {}
    for name in (*config.vector_files, ROUTERS_NAME):
        path = file_in(directory, name)
        if path is None:
            raise CheckpointError(f"{directory / name}: no such file")
        if name == ROUTERS_NAME:
            routers = sum(tensor.elements for tensor in read_header(path).values())
        else:
            vectors |= read_header(path)
    modules = tuple(_module(module, config, vectors, checkpoint.tensors) for module in config.modules)
    return Overview(library, config.experts, parameters, nbytes, modules, routers)


def _module(
    module: ModuleConfig, config: WemoeConfig, vectors: dict[str, StoredTensor], tensors: Any
) -> ModuleOverview:
    own = [tensor for name, tensor in tensors.items() if name.startswith(f"{module.path}.")]
    moved = [tensor for name, tensor in vectors.items() if name.startswith(f"{module.path}.")]
    forms = sorted({layer.form if layer.rank is None else f"{layer.form} {layer.rank}" for layer in module.layers})
    spec = config.routers[module.router]
    shared = "" if module.router == module.path else f", {module.router}"
    return ModuleOverview(
        module.path,
        ", ".join(forms),
        f"depth {spec.depth}, width {spec.width}{shared}",
        module.lambdas,
        sum(tensor.elements for tensor in own),
        sum(tensor.elements for tensor in moved),
        sum(tensor.nbytes for tensor in moved),
    )


def overview_lines(overview: Overview, format_size: Callable[[int], str]) -> list[str]:
    """The overview as a table."""
    lines = [f"{overview.library}, {overview.parameters:,} parameters, {format_size(overview.nbytes)}"]
    if not overview.modules:
        return [*lines, "a static merge: no module is upscaled"]
    lines += [f"experts: {', '.join(overview.experts)}", ""]
    width = max(len(module.path) for module in overview.modules)
    head = f"{'module':<{width}}  {'form':<14}{'weights':>12}{'task vectors':>14}{'size':>10}  {'router':<22}λ"
    lines.append(head)
    for m in overview.modules:
        numbers = f"{m.static_parameters:>12,}{m.vector_parameters:>14,}{format_size(m.vector_bytes):>10}"
        lambdas = ", ".join(f"{value:g}" for value in m.lambdas)
        lines.append(f"{m.path:<{width}}  {m.form:<14}{numbers}  {m.router:<22}{lambdas}")
    vectors = sum(module.vector_parameters for module in overview.modules)
    size = format_size(sum(module.vector_bytes for module in overview.modules))
    total = overview.parameters + vectors + overview.router_parameters
    share = total / overview.parameters
    return [
        *lines,
        "",
        f"{len(overview.modules)} modules: {vectors:,} parameters of task vectors ({size}), "
        f"{overview.router_parameters:,} of routers; in all {share:.2f} x the ordinary checkpoint",
    ]
