"""See that an output directory keeps its promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from wemoe_plugin.checkpoints.manifest import read_manifest, sha256_of, unlisted
from wemoe_plugin.modeling.config import CONFIG_NAME
from wemoe_plugin.modeling.loading import load_model, load_static
from wemoe_plugin.modeling.samples import outputs_by_row, sample_inputs
from wemoe_plugin.modeling.wemoe import wemoe_modules
from wemoe_plugin.pipeline.checks import TOLERANCE, Check, check_vectors

ROWS = 5


def verify(directory: Path, seed: int = 0) -> list[Check]:
    """Check an output directory on made-up inputs.

    Args:
        directory: an output of wemoe-merge.
        seed: of the inputs.

    Returns:
        One entry per promise: the files are those of the manifest; the ordinary checkpoint loads and its outputs are
        finite; the WEMoE model is the ordinary checkpoint at the routing of its static merge; its layers compute with
        the task vectors of the files, whose norms are those noted of them; and whatever routers decide, a row's output
        depends on that row alone.

    Raises:
        CheckpointError: the directory is no output, or cannot be loaded.
    """
    checks = [_manifest(directory)]
    static, model = (_with_padding(load(directory)) for load in (load_static, load_model))
    generator = torch.Generator().manual_seed(seed)
    inputs = sample_inputs(static, ROWS, generator)
    plain = outputs_by_row(static, inputs)
    checks.append(_finite("the ordinary checkpoint's outputs are finite", plain))
    if not (directory / CONFIG_NAME).is_file():
        return checks
    whole = outputs_by_row(model, inputs)
    checks.append(_finite("the WEMoE model's outputs are finite", whole))
    with _routed_as_static(model):
        checks.append(_equal("routed at λ it is the ordinary checkpoint", plain, outputs_by_row(model, inputs)))
    checks += check_vectors(directory, static, model, generator)
    _stir(model, generator)
    whole = outputs_by_row(model, inputs)
    order = torch.randperm(ROWS, generator=generator)
    for promise, parts in (
        ("a row alone gives what it gives in a batch", [[row] for row in range(ROWS)]),
        ("batches of odd sizes give the same", [[0, 1], [2, 3, 4]]),
        ("shuffled rows give the same", [order.tolist()]),
    ):
        checks.append(_equal(promise, whole, _in_parts(model, inputs, parts)))
    return checks


def _with_padding(model: nn.Module) -> nn.Module:
    """Classifiers look for the last token that is not padding, and refuse batches where none is named."""
    config = getattr(model, "config", None)
    settings = getattr(config, "text_config", config)
    if getattr(settings, "pad_token_id", 0) is None:
        settings.pad_token_id = 0  # type: ignore[union-attr]
    return model


def _manifest(directory: Path) -> Check:
    promise = "the files are those of the manifest"
    files = read_manifest(directory)["files"]
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            return Check(promise, False, f"{name} is absent")
        described = isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry)
        if not described or path.stat().st_size != entry["bytes"] or sha256_of(path) != entry["sha256"]:
            return Check(promise, False, f"{name} has been changed")
    others = unlisted(directory, files)
    return Check(promise, not others, f"{others[0]} is not in it" if others else f"{len(files)} files")


def _finite(promise: str, outputs: Mapping[str, Tensor]) -> Check:
    bad = [name for name, value in outputs.items() if not torch.isfinite(value).all()]
    return Check(promise, bool(outputs) and not bad, f"{bad[0]} is not" if bad else f"{len(outputs)} outputs")


def _equal(promise: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Check:
    worst = 0.0
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        difference = float((found[name] - value).abs().max()) / scale
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return Check(promise, worst <= TOLERANCE, f"largest difference {worst:.1e} of the largest output")


def _in_parts(model: nn.Module, inputs: Mapping[str, Tensor], parts: list[list[int]]) -> dict[str, Tensor]:
    """Outputs in the inputs' order, though the rows went in as these parts."""
    order = torch.tensor([row for part in parts for row in part])
    found = [outputs_by_row(model, {name: value[part] for name, value in inputs.items()}) for part in parts]
    return {name: torch.cat([outputs[name] for outputs in found])[order.argsort()] for name in found[0]}


@torch.no_grad()
def _stir(model: nn.Module, generator: torch.Generator) -> None:
    """Let every router decide otherwise for every input; fresh ones decide the same for all."""
    routers = {id(module.router): module.router for _, module in wemoe_modules(model)}
    for router in routers.values():
        for parameter in router.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter) / math.sqrt(max(1, parameter.shape[-1])))


@contextmanager
def _routed_as_static(model: nn.Module) -> Iterator[None]:
    """Let every router give λ for the time being."""
    hooks = [module.router.register_forward_hook(_giving(module.lambdas)) for _, module in wemoe_modules(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _giving(lambdas: Tensor) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda router, inputs, weights: lambdas.to(weights.dtype).expand_as(weights)
