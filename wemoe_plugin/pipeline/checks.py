"""Promises of an output about its task vectors, seen on a few of its modules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wemoe_plugin.checkpoints.containment import file_in
from wemoe_plugin.checkpoints.conv1d import is_conv1d
from wemoe_plugin.checkpoints.header import StoredTensor, read_header
from wemoe_plugin.checkpoints.ranges import RangeReader
from wemoe_plugin.checkpoints.tensors import read_as
from wemoe_plugin.modeling.config import NORMS, WemoeConfig, read_config
from wemoe_plugin.modeling.ensembled_linear import EnsembledLinear
from wemoe_plugin.modeling.placement import PlacedModule, place
from wemoe_plugin.modeling.stored import StoredVectors, stored_vectors
from wemoe_plugin.modeling.wemoe import WeightEnsemblingMoE
from wemoe_plugin.task_vectors.low_rank import product_norm

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest output, that rounding may make in float32."""

_NORM_TOLERANCE = 0.02
"""The same of norms, whose task vectors may be stored in half precision."""

_LOOKED_AT = 3
"""Modules that are looked at: the first, one in the middle, the last."""


@dataclass(frozen=True)
class Check:
    """A promise, whether it is kept, and what was seen."""

    promise: str
    kept: bool
    seen: str


def check_vectors(directory: Path, static: nn.Module, model: nn.Module, generator: torch.Generator) -> list[Check]:
    """See that layers compute with the task vectors of the files, and that these have the norms noted of them.

    Args:
        directory: an output with upscaled modules.
        static: its ordinary model.
        model: its WEMoE model.
        generator: draws inputs and offsets.
    """
    config = read_config(directory)
    vectors = stored_vectors(directory, config)
    placed = place(static, config)[0]
    step = max(1, (len(placed) - 1) // (_LOOKED_AT - 1))
    some = placed[::step]
    with RangeReader(dict.fromkeys(part.file for own in vectors.values() for part in own.parts)) as reader:
        differences = [_difference(reader, static, model, module, vectors, generator) for module in some]
        norms = [error for module in some for error in _norm_errors(reader, directory, config, module, vectors)]
    worst = max(differences, default=0.0)
    promise = "layers compute with the files' task vectors"
    checks = [
        Check(promise, worst <= TOLERANCE, f"largest difference {worst:.1e}, {len(some)} of {len(placed)} modules")
    ]
    if norms:
        seen = f"largest difference {max(norms):.1e}"
        checks.append(Check("compressed task vectors have the norms noted", max(norms) <= _NORM_TOLERANCE, seen))
    return checks


@torch.no_grad()
def _difference(
    reader: RangeReader,
    static: nn.Module,
    model: nn.Module,
    placed: PlacedModule,
    vectors: dict[str, StoredVectors],
    generator: torch.Generator,
) -> float:
    """Between a module's layers and plain ones of weights composed from the files, of the largest output."""
    wrapper = model.get_submodule(placed.path)
    assert isinstance(wrapper, WeightEnsemblingMoE)
    worst = 0.0
    for place_of in placed.layers:
        inner = place_of.path[len(placed.path) + 1 :]
        layer, plain = wrapper.module.get_submodule(inner), static.get_submodule(place_of.path)
        assert isinstance(layer, EnsembledLinear)
        offsets = torch.randn(1, len(wrapper.lambdas), generator=generator)
        x = torch.randn(1, 3, layer.in_features, generator=generator)
        weight = _moved(reader, plain.weight, vectors[f"{place_of.name}.weight"], offsets[0])
        if is_conv1d(plain):
            weight = weight.T
        bias = plain.bias
        own = vectors.get(f"{place_of.name}.bias")
        if isinstance(bias, Tensor) and own is not None:
            bias = _moved(reader, bias, own, offsets[0])
        expected = F.linear(x, weight, bias)  # type: ignore[arg-type]
        difference = float((layer.form(x, offsets) - expected).abs().max())
        worst = max(worst, difference / (float(expected.abs().max()) or 1.0))
    return worst if math.isfinite(worst) else math.inf


def _moved(reader: RangeReader, static: object, vectors: StoredVectors, offsets: Tensor) -> Tensor:
    """A parameter, as it is stored, with task vectors on top."""
    assert isinstance(static, Tensor)
    result = static.detach().clone()
    shape = tuple(result.shape)
    for k, offset in enumerate(offsets.tolist()):
        result.add_(vectors.of_expert(reader, shape, k)(0, result.numel()).view(shape), alpha=offset)
    return result


def _norm_errors(
    reader: RangeReader, directory: Path, config: WemoeConfig, placed: PlacedModule, vectors: dict[str, StoredVectors]
) -> list[float]:
    """|√(‖kept‖² + ‖dropped‖²) − ‖τ‖| / ‖τ‖ of every compressed task vector of a module."""
    noted: dict[str, StoredTensor] = {}
    for name in config.vector_files:
        path = file_in(directory, name)
        noted |= {} if path is None else read_header(path)
    errors = []
    for layer in placed.layers:
        own = vectors[f"{layer.name}.weight"]
        if own.form == "dense":
            continue
        stored = noted[f"{layer.name}.weight.task_vectors{NORMS}"]
        for k in range(len(config.experts)):
            whole, dropped = read_as(reader, stored, 2 * k, 2, torch.float64).tolist()
            if own.form == "low_rank":
                kept = float(product_norm(*own.factors(reader, k)))
            else:
                count = own.parts[0].shape[1]
                kept = float(read_as(reader, own.parts[0], k * count, count, torch.float64).norm())
            errors.append(abs(math.hypot(kept, dropped) - whole) / whole if whole else kept)
    return [error if math.isfinite(error) else math.inf for error in errors]
