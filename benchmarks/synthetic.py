"""Checkpoints of given shapes for benchmarks: headers alone with holes for data, or filled with random numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wemoe_plugin.checkpoints.header import ITEM_BYTES, build_header

Shapes = dict[str, tuple[int, ...]]


def transformer_shapes(prefix: str, layers: int, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The layers of a transformers CLIP tower."""
    for i in range(layers):
        layer = f"{prefix}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{layer}.self_attn.{name}.weight", (width, width)
            yield f"{layer}.self_attn.{name}.bias", (width,)
        yield f"{layer}.mlp.fc1.weight", (hidden, width)
        yield f"{layer}.mlp.fc1.bias", (hidden,)
        yield f"{layer}.mlp.fc2.weight", (width, hidden)
        yield f"{layer}.mlp.fc2.bias", (width,)
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{layer}.{name}.weight", (width,)
            yield f"{layer}.{name}.bias", (width,)


def clip_vit_b32_shapes() -> Shapes:
    """transformers' CLIP ViT-B/32: 151 million parameters."""
    shapes: Shapes = {
        "logit_scale": (),
        "text_model.embeddings.token_embedding.weight": (49408, 512),
        "text_model.embeddings.position_embedding.weight": (77, 512),
        "vision_model.embeddings.patch_embedding.weight": (768, 3, 32, 32),
        "vision_model.embeddings.position_embedding.weight": (50, 768),
        "vision_model.embeddings.class_embedding": (768,),
        "text_projection.weight": (512, 512),
        "visual_projection.weight": (512, 768),
    }
    shapes |= dict(transformer_shapes("text_model", 12, 512, 2048))
    return shapes | dict(transformer_shapes("vision_model", 12, 768, 3072))


def write_clip_vit_b32(directory: Path) -> None:
    """A float32 directory whose weights are a hole in the file."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"architectures": ["CLIPModel"]}))
    write_weights(directory / "model.safetensors", clip_vit_b32_shapes(), "F32", None)


def write_weights(path: Path, shapes: Shapes, dtype: str, seed: int | None) -> int:
    """Write a safetensors file and return its size in bytes.

    Args:
        path: the file.
        shapes: of its tensors.
        dtype: ``F32``, ``F16`` or ``BF16``.
        seed: of small random numbers; None for a hole, which reads as zeros.
    """
    header = build_header([(name, dtype, shape) for name, shape in shapes.items()], {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        end = len(header)
        generator = np.random.default_rng(seed)
        for shape in shapes.values():
            count = int(np.prod(shape, dtype=np.int64))
            if seed is not None:
                file.write(_random_bytes(generator, count, dtype))
            end += count * ITEM_BYTES[dtype]
        file.truncate(end)
    return end


def _random_bytes(generator: np.random.Generator, count: int, dtype: str) -> bytes:
    values = generator.standard_normal(count, dtype=np.float32) * np.float32(0.02)
    stored: np.ndarray = values.astype(np.float16 if dtype == "F16" else np.float32)
    if dtype == "BF16":
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    return bytes(stored.data)
