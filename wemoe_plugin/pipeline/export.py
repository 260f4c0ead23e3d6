"""A plain dense checkpoint from an output directory: the static merge, or one mix of its experts."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from wemoe_plugin.checkpoints.checkpoint import open_checkpoint
from wemoe_plugin.checkpoints.companions import copy_companions
from wemoe_plugin.checkpoints.header import StoredTensor
from wemoe_plugin.checkpoints.manifest import doubt_output, write_manifest
from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.checkpoints.staging import staged_directory
from wemoe_plugin.checkpoints.tensors import TORCH_DTYPE, read_as, read_stored, write
from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.merging.memory import CHUNK_ELEMENTS
from wemoe_plugin.modeling.config import CONFIG_NAME, WemoeConfig, read_config
from wemoe_plugin.modeling.stored import StoredVectors, stored_vectors


def export(directory: Path, out: Path, mix: Mapping[str, float] | None, *, force: bool = False) -> int:
    """Write the ordinary checkpoint that the model is for one constant routing.

    Args:
        directory: an output of wemoe-merge.
        out: the new directory.
        mix: the weight of every expert's task vectors, 0 for those that are not named; None for the static merge.
        force: replace an earlier output.

    Returns:
        The number of tensors that differ from the static merge.

    Raises:
        CheckpointError: the directory is not an output, or is damaged.
        PlanError: an expert is unknown, there is nothing to mix, or the output is in the way.
    """
    checkpoint = open_checkpoint(directory)
    if directory.resolve() in (out.resolve(), *out.resolve().parents):
        raise PlanError(f"{out}: lies in the directory that is exported; choose another one")
    if mix is None and not (directory / CONFIG_NAME).is_file():
        raise PlanError(f"{directory}: has no upscaled modules; it is a plain checkpoint already")
    vectors: dict[str, StoredVectors] = {}
    offsets: dict[str, tuple[float, ...]] = {}
    if mix is not None:
        config = read_config(directory)
        _check_names(directory, config, mix)
        vectors = stored_vectors(directory, config)
        for name, own in vectors.items():
            lambdas = zip(config.experts, own.lambdas, strict=True)
            offsets[name] = tuple(mix.get(expert, 0.0) - value for expert, value in lambdas)
    missing = sorted(set(vectors) - set(checkpoint.tensors))
    if missing:
        raise CheckpointError(f"{directory}: has task vectors for {missing[0]!r}, which its checkpoint lacks")
    files: dict[Path, list[StoredTensor]] = {}
    for tensor in checkpoint.tensors.values():
        assert isinstance(tensor, StoredTensor), "an output has no adapters"
        files.setdefault(tensor.file, []).append(tensor)
    inputs = dict.fromkeys([*files, *(stored.file for v in vectors.values() for stored in v.parts)])
    with staged_directory(out, force, doubt_output) as stage, RangeReader(inputs) as reader, ExitStack() as opened:
        copy_companions(directory, stage.directory, None)
        for path, tensors in files.items():
            ordered = sorted(tensors, key=lambda tensor: tensor.offset)
            target = TensorFile(stage.directory / path.name, ((t.name, t.dtype, t.shape) for t in ordered))
            opened.callback(target.close)
            for tensor in ordered:
                for start, values in _mixed(reader, tensor, vectors.get(tensor.name), offsets.get(tensor.name, ())):
                    write(target, tensor.name, start, values)
            target.sync()
        for index in directory.glob("*.index.json"):
            if not index.name.startswith("wemoe."):
                shutil.copyfile(index, stage.directory / index.name)
        write_manifest(stage.directory, {"exported_from": directory.name, "mix": None if mix is None else dict(mix)})
    return len(vectors)


def parse_mix(text: str) -> dict[str, float]:
    """Read ``digits=0.7,shapes=0.3``.

    Raises:
        PlanError: it is not of this form.
    """
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, mark, value = part.strip().partition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not name or not mark or number != number or abs(number) == float("inf") or name in mix:
            raise PlanError(f"--mix {text}: expected NAME=NUMBER, each name once, such as digits=0.7,shapes=0.3")
        mix[name] = number
    return mix


def _check_names(directory: Path, config: WemoeConfig, mix: Mapping[str, float]) -> None:
    for name in mix:
        if name not in config.experts:
            near = difflib.get_close_matches(name, config.experts, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f" (it has {', '.join(config.experts)})"
            raise PlanError(f"{directory}: has no expert {name!r}{hint}")


def _mixed(
    reader: RangeReader, tensor: StoredTensor, vectors: StoredVectors | None, offsets: tuple[float, ...]
) -> Iterator[tuple[int, Tensor]]:
    """Ranges of W_static + Σₖ oₖ τₖ from their first element on, of whole rows."""
    row = max(1, tensor.elements // max(1, tensor.shape[0])) if tensor.shape else 1
    step = max(row, CHUNK_ELEMENTS // row * row)
    moving = [] if vectors is None else [(k, offset) for k, offset in enumerate(offsets) if offset]
    experts = [] if vectors is None else [(offset, vectors.of_expert(reader, tensor.shape, k)) for k, offset in moving]
    for start in range(0, tensor.elements, step):
        count = min(step, tensor.elements - start)
        if vectors is None:
            yield start, read_stored(reader, tensor, start, count, torch.float32)
            continue
        total = read_as(reader, tensor, start, count, torch.float32)
        for offset, vector in experts:
            total.add_(vector(start, count), alpha=offset)
        if not torch.isfinite(total.to(TORCH_DTYPE[tensor.dtype])).all():
            raise PlanError(f"{tensor.name!r} is too large for {tensor.dtype} with this mix")
        yield start, total
