"""Turn a torch file into safetensors without running any code it may hold."""

from __future__ import annotations

from pathlib import Path

from wemoe_plugin.checkpoints.checkpoint import WEIGHT_NAMES, open_checkpoint
from wemoe_plugin.checkpoints.companions import copy_companions, find_companions
from wemoe_plugin.checkpoints.header import ITEM_BYTES, StoredTensor
from wemoe_plugin.checkpoints.manifest import doubt_output, write_manifest
from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.checkpoints.staging import staged_directory
from wemoe_plugin.checkpoints.torch_file import read_torch_header
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.merging.memory import CHUNK_ELEMENTS


def convert(source: Path, out: Path, like: Path | None = None, *, force: bool = False) -> int:
    """Write the tensors of a torch file, and nothing else of it, as safetensors.

    Args:
        source: a file that ``torch.save`` wrote; objects in it that are no tensors are passed over, never built.
        out: the new directory.
        like: a model directory whose configuration and tokenizer go with the weights; without it the weights stand
            alone in ``model.safetensors``, to be named as an expert.
        force: replace an earlier output.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: the file is none, or is damaged.
        PlanError: the output is in the way.
    """
    tensors = read_torch_header(source, opaque=True)
    library = None if like is None else open_checkpoint(like).library
    if like is not None and library is None:
        raise CheckpointError(f"{like}: must be a directory with a configuration")
    if like is not None:
        find_companions(like)
    with staged_directory(out, force, doubt_output) as stage:
        work = stage.directory
        if like is not None:
            copy_companions(like, work, None)
        _write(tensors, work / f"{WEIGHT_NAMES[library or 'transformers']}.safetensors")
        write_manifest(work, {"converted_from": source.name})
    return len(tensors)


def _write(tensors: dict[str, StoredTensor], path: Path) -> None:
    ordered = sorted(tensors.items(), key=lambda item: -ITEM_BYTES[item[1].dtype])
    file = TensorFile(path, ((name, tensor.dtype, tensor.shape) for name, tensor in ordered))
    buffer = memoryview(bytearray(CHUNK_ELEMENTS * max(ITEM_BYTES.values())))
    try:
        with RangeReader(dict.fromkeys(tensor.file for tensor in tensors.values())) as reader:
            for name, tensor in ordered:
                for start in range(0, tensor.elements, CHUNK_ELEMENTS):
                    count = min(CHUNK_ELEMENTS, tensor.elements - start)
                    part = buffer[: count * ITEM_BYTES[tensor.dtype]]
                    reader.fill(tensor, start, part)
                    file.put(name, start, part)
        file.sync()
    finally:
        file.close()
