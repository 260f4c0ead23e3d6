"""Small models of the real classes, one row per architecture that the documents name."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import transformers
from models import OPEN_CLIP_CONFIG, fine_tuned, save_state, transformers_clip_config
from torch import Tensor, nn

from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.modeling.samples import outputs_by_row, sample_inputs
from wemoe_plugin.modeling.wemoe import wemoe_modules
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SHAPE, "initializer_range": 0.3, "vocab_size": 24, "max_position_embeddings": 32, "pad_token_id": 0}
LLAMA = {**TEXT, "num_key_value_heads": 1, "tie_word_embeddings": False}
IMAGE = {**SHAPE, "image_size": 16, "patch_size": 8, "num_labels": 3}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 24, "decoder_start_token_id": 0}
TIMM = {
    "embed_dim": 16,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "", "image_size": 160},
    "text_cfg": OPEN_CLIP_CONFIG["text_cfg"],
}


def in_transformers(kind: str, config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(config)


def open_clip_model() -> nn.Module:
    return open_clip.model.CLIP(**copy.deepcopy(OPEN_CLIP_CONFIG))


def timm_tower() -> nn.Module:
    config = copy.deepcopy(TIMM)
    config["embed_dim"] = 64  # without a projection, the tower's own width
    return open_clip.model.CLIP(**config)


class Row(NamedTuple):
    """An architecture: its model; which parameters a keyword stands for, and how many modules."""

    build: Callable[[], nn.Module]
    mlp: str
    mlps: int
    attention: str | None
    attentions: int


BERT_MLP = r"layer\.\d+\.(intermediate|output)\.dense"
ROWS = {
    "open_clip": Row(open_clip_model, r"\.mlp\.", 4, None, 0),
    "open_clip with a timm tower": Row(timm_tower, r"\.mlp\.", 8, None, 0),
    "CLIP": Row(in_transformers("CLIPModel", transformers_clip_config()), r"\.mlp\.", 4, r"self_attn", 4),
    "CLIP vision tower": Row(
        in_transformers("CLIPVisionModel", transformers_clip_config().vision_config), r"\.mlp\.", 2, r"self_attn", 2
    ),
    "ViT": Row(
        in_transformers("ViTForImageClassification", transformers.ViTConfig(**IMAGE)), r"\.mlp\.", 2, r"[qkvo]_proj", 2
    ),
    "DINOv2": Row(
        in_transformers(
            "Dinov2ForImageClassification",
            transformers.Dinov2Config(**{k: v for k, v in IMAGE.items() if k != "intermediate_size"}),
        ),
        *(r"\.mlp\.", 2, r"[qkvo]_proj", 2),
    ),
    "T5": Row(
        in_transformers("T5ForConditionalGeneration", transformers.T5Config(num_layers=3, num_decoder_layers=2, **T5)),
        *(r"DenseReluDense", 5, r"Attention\.[qkvo]\.", 7),
    ),
    "Flan-T5": Row(
        in_transformers(
            "T5ForConditionalGeneration",
            transformers.T5Config(num_layers=1, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5),
        ),
        *(r"DenseReluDense", 2, r"Attention\.[qkvo]\.", 3),
    ),
    "Llama": Row(
        in_transformers("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA)), r"\.mlp\.", 2, r"self_attn\.._proj", 2
    ),
    "Mistral": Row(
        in_transformers("MistralForCausalLM", transformers.MistralConfig(**LLAMA)),
        *(r"\.mlp\.", 2, r"self_attn\.._proj", 2),
    ),
    "Qwen2": Row(
        in_transformers("Qwen2ForCausalLM", transformers.Qwen2Config(**LLAMA)), r"\.mlp\.", 2, r"self_attn\.._proj", 2
    ),
    "Qwen3": Row(
        in_transformers("Qwen3ForCausalLM", transformers.Qwen3Config(head_dim=8, **LLAMA)),
        *(r"\.mlp\.", 2, r"self_attn\.._proj", 2),
    ),
    "BERT": Row(
        in_transformers("BertForSequenceClassification", transformers.BertConfig(**TEXT)),
        *(BERT_MLP, 4, r"attention\.(self\.|output\.dense)", 2),
    ),
    "RoBERTa": Row(
        in_transformers("RobertaForSequenceClassification", transformers.RobertaConfig(**TEXT)),
        *(BERT_MLP, 4, r"attention\.(self\.|output\.dense)", 2),
    ),
    "GPT-2": Row(
        in_transformers(
            "GPT2LMHeadModel",
            transformers.GPT2Config(
                **{"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 24, "n_positions": 32},
                **{"bos_token_id": 0, "eos_token_id": 0},
            ),
        ),
        *(r"\.mlp\.", 2, r"\.attn\.", 2),
    ),
}


def save(model: nn.Module, directory: Path) -> None:
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(directory)
        return
    timm = hasattr(model.visual, "trunk")
    config = {**TIMM, "embed_dim": 64} if timm else OPEN_CLIP_CONFIG
    directory.mkdir()
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_state(model.state_dict(), directory / "open_clip_model.safetensors")


def family(row: Row, directory: Path, moved: str) -> tuple[nn.Module, list[nn.Module]]:
    """A base and two experts that moved where a name matches, under ``base``, ``e0`` and ``e1``."""
    torch.manual_seed(0)
    base = row.build().eval()
    experts = [fine_tuned(base, seed).eval() for seed in range(2)]
    state = base.state_dict()
    for expert in experts:
        with torch.no_grad():
            for name, tensor in expert.state_dict().items():
                if not re.search(moved, name):
                    tensor.copy_(state[name])
    for name, model in (("base", base), ("e0", experts[0]), ("e1", experts[1])):
        save(model, directory / name)
    return base, experts


def merged(directory: Path, match: str, parameters: str) -> Path:
    (directory / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: e0}, {model: e1}]\nmerge_method: task_arithmetic\n"
        f"parameters: {{lambda: 0.3}}\nrules: [{{match: {match}, merge_method: wemoe, parameters: {parameters}}}]\n"
    )
    source = load_recipe(directory / "recipe.yaml")
    merge(source, plan_merge(source), directory / "out")
    return directory / "out"


def route(model: nn.Module, weights: Tensor) -> None:
    """Let every router give these weights for any input."""
    with torch.no_grad():
        for _, module in wemoe_modules(model):
            for parameter in module.router.parameters():
                parameter.zero_()
            assert module.router.output is not None
            module.router.output.bias.copy_(weights)


def same(found: nn.Module, expected: nn.Module) -> bool:
    inputs = sample_inputs(expected, 3, torch.Generator().manual_seed(0))
    ours, theirs = outputs_by_row(found, inputs), outputs_by_row(expected, inputs)
    return bool(ours) and all(torch.allclose(ours[name], theirs[name], rtol=0, atol=2e-4) for name in theirs)
