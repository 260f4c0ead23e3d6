"""What an output directory holds, from its configuration and the headers of its files."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wemoe_plugin.checkpoints.checkpoint import open_checkpoint
from wemoe_plugin.checkpoints.containment import file_in
from wemoe_plugin.checkpoints.header import StoredTensor, read_header
from wemoe_plugin.checkpoints.manifest import read_manifest
from wemoe_plugin.checkpoints.ranges import RangeReader
from wemoe_plugin.checkpoints.sources import Source
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.merging.module_table import ModuleRow, describe_router, describe_sizes, module_lines
from wemoe_plugin.modeling.config import CONFIG_NAME, NORMS, ROUTERS_NAME, ModuleConfig, WemoeConfig, read_config


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
    modules: tuple[ModuleRow, ...]
    router_parameters: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "modules": [{**vars(module), "error": module.error} for module in self.modules]}


def read_overview(directory: Path) -> Overview:
    """Look into an output directory; no tensor is read but the norms of what compression dropped.

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
    norms = _read_norms(vectors)
    modules = tuple(_module(module, config, vectors, norms, checkpoint.tensors) for module in config.modules)
    return Overview(library, config.experts, parameters, nbytes, modules, routers)


def _read_norms(vectors: Mapping[str, StoredTensor]) -> dict[str, tuple[float, float]]:
    """By the task vectors' name, √Σ ‖τ‖² and √Σ ‖dropped‖² over the experts."""
    stored = {name.removesuffix(NORMS): tensor for name, tensor in vectors.items() if name.endswith(NORMS)}
    found = {}
    with RangeReader(dict.fromkeys(tensor.file for tensor in stored.values())) as reader:
        for name, tensor in stored.items():
            values = array("f", bytes(tensor.nbytes))
            if tensor.dtype != "F32":
                raise CheckpointError(f"{tensor.file}: {tensor.name!r} is {tensor.dtype}, not F32")
            reader.fill(tensor, 0, memoryview(values).cast("B"))
            found[name] = math.hypot(*values[::2]), math.hypot(*values[1::2])
    return found


def _module(
    module: ModuleConfig,
    config: WemoeConfig,
    vectors: Mapping[str, StoredTensor],
    norms: Mapping[str, tuple[float, float]],
    tensors: Mapping[str, Source],
) -> ModuleRow:
    own = [tensor for name, tensor in tensors.items() if name.startswith(f"{module.path}.")]
    moved = {name: tensor for name, tensor in vectors.items() if name.startswith(f"{module.path}.")}
    lost = [norms[name] for name in norms if name.startswith(f"{module.path}.")]
    form = module.layers[0].form
    sizes = [layer.ranks or ((layer.count,) if layer.count else ()) for layer in module.layers]
    spec = config.routers[module.router]
    return ModuleRow(
        module.path,
        describe_sizes(form, sizes),
        describe_router(module.router, module.path, spec.depth, spec.width, spec.routing),
        module.lambdas,
        sum(tensor.elements for tensor in own),
        sum(tensor.elements for name, tensor in moved.items() if not name.endswith((".indices", NORMS))),
        sum(tensor.nbytes for tensor in moved.values()),
        math.hypot(*(norm for norm, _ in lost)) if lost or form == "dense" else None,
        math.hypot(*(dropped for _, dropped in lost)) if lost or form == "dense" else None,
    )


def overview_lines(overview: Overview, format_size: Callable[[int], str]) -> list[str]:
    """The overview as a table."""
    lines = [f"{overview.library}, {overview.parameters:,} parameters, {format_size(overview.nbytes)}"]
    if not overview.modules:
        return [*lines, "a static merge: no module is upscaled"]
    lines += [f"experts: {', '.join(overview.experts)}", ""]
    lines += module_lines(overview.modules, format_size)
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
