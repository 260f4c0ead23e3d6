"""Load what wemoe-merge wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from wemoe_plugin.checkpoints.checkpoint import open_checkpoint
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.modeling.attach import attach
from wemoe_plugin.modeling.composition import WORKING_BYTES
from wemoe_plugin.modeling.config import CONFIG_NAME
from wemoe_plugin.modeling.families import FAMILIES, ModelFamily


def family_of(path: Path | str) -> ModelFamily:
    """The library that builds a directory's model."""
    library = open_checkpoint(Path(path)).library
    if library is None:
        raise CheckpointError(f"{path}: a lone file has no configuration to build a model from")
    return FAMILIES[library]


def load_static(path: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The ordinary checkpoint of a directory, by its own library: for an output of wemoe-merge, the static merge."""
    return family_of(path).build(Path(path), dtype).to(device)


def load_model(
    path: Path | str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    working_bytes: int = WORKING_BYTES,
) -> nn.Module:
    """The WEMoE model of a directory; without upscaled modules, its ordinary model.

    Args:
        path: an output directory.
        device: where to put it.
        dtype: of its parameters.
        working_bytes: the most that the composed weights of one layer take at a time, for dense and sparse task
            vectors; by default 256 MiB.

    Returns:
        The library's own model in eval mode, its upscaled modules replaced by `WeightEnsemblingMoE`.

    Raises:
        CheckpointError: the directory is absent, damaged, or not a model.
    """
    model = load_static(path, device, dtype)
    if (Path(path) / CONFIG_NAME).is_file():
        attach(model, path, working_bytes)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    return model.to(device).eval()
