"""Small models of the real classes, and their fine-tunes, made for the tests."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

OPEN_CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
}


class Mlp(nn.Module):
    """The MLP of a ViT block, on its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def fine_tuned(module: nn.Module, seed: int, scale: float = 0.05) -> nn.Module:
    """A copy whose floating-point parameters have all moved a little."""
    result = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return result


def save_state(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, path, {"format": "pt"})


def save_open_clip(model: nn.Module, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """An ordinary open_clip directory."""
    directory.mkdir(parents=True)
    config = {"model_cfg": OPEN_CLIP_CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    save_state({n: t.to(dtype) for n, t in model.state_dict().items()}, directory / "open_clip_model.safetensors")
    return directory


def open_clip_family(directory: Path, experts: int = 2, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """A base and its fine-tunes under ``base``, ``e0``, ``e1``, ...; returns the models, the base first."""
    torch.manual_seed(0)
    models = [open_clip.model.CLIP(**copy.deepcopy(OPEN_CLIP_CONFIG)).eval()]
    models += [fine_tuned(models[0], seed).eval() for seed in range(experts)]
    for name, model in zip(["base", *(f"e{k}" for k in range(experts))], models, strict=True):
        save_open_clip(model, directory / name, dtype)
    return models


def transformers_clip_config() -> CLIPConfig:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 520, "max_position_embeddings": 24, "bos_token_id": 470, "eos_token_id": 471}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def transformers_family(directory: Path, experts: int = 2) -> tuple[CLIPModel, Sequence[CLIPVisionModel]]:
    """A CLIPModel under ``base`` and fine-tuned vision towers under ``e0``, ``e1``, ..., as the published ones are."""
    torch.manual_seed(0)
    config = transformers_clip_config()
    base = CLIPModel(config).eval()
    tower = CLIPVisionModel(config.vision_config).eval()
    tower.load_state_dict(base.vision_model.state_dict())
    towers = [fine_tuned(tower, seed) for seed in range(experts)]
    for name, model in [("base", base), *((f"e{k}", tower) for k, tower in enumerate(towers))]:
        model.save_pretrained(directory / name)
    return base, towers
