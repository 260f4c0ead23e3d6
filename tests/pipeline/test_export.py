"""An exported mix is the WEMoE model with its routers at that mix, as an ordinary checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from models import fine_tuned, open_clip_family
from snapshots import tree
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.modeling.loading import load_model
from wemoe_plugin.modeling.wemoe import wemoe_modules
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe

Command = Callable[..., tuple[int, str, str]]
HEAD = (
    "base_model: base\nmodels: [{model: e0}, {model: e1}]\nmerge_method: task_arithmetic\nparameters: {lambda: 0.3}\n"
)
DENSE = HEAD + "rules: [{match: mlp, merge_method: wemoe}]\n"
LOW_RANK = HEAD + "rules: [{match: mlp, merge_method: wemoe, parameters: {task_vectors: {form: low_rank, rank: 3}}}]\n"

ENERGY = LOW_RANK.replace("rank: 3", "energy: 0.8")
SPARSE = LOW_RANK.replace("form: low_rank, rank: 3", "form: sparse, density: 0.2")


class Constant(nn.Module):
    """A router that has made up its mind."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weights = torch.tensor(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weights.expand(x.shape[0], -1)


def merged(directory: Path, text: str, shard_bytes: int | None = None) -> Path:
    (directory / "recipe.yaml").write_text(text)
    source = load_recipe(directory / "recipe.yaml")
    merge(source, plan_merge(source, shard_bytes), directory / "out")
    return directory / "out"


def with_weights(directory: Path, weights: list[float]) -> nn.Module:
    model = load_model(directory)
    for _, module in wemoe_modules(model):
        module.router = Constant(weights)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("text", [DENSE, LOW_RANK, ENERGY, SPARSE], ids=["dense", "low-rank", "ragged", "sparse"])
def test_a_mix_of_open_clip_experts(tmp_path: Path, command: Command, text: str) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, text)
    status, said, err = command("export", out, tmp_path / "mixed", "--mix", "e1=0.9, e0=-0.2")
    assert (status, err) == (0, "")
    assert "16 tensors" in said
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'mixed'}").eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = with_weights(out, [-0.2, 0.9]).encode_image(images)  # type: ignore[operator]
    torch.testing.assert_close(plain.encode_image(images), expected, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "mixed" / "manifest.json").read_text())["mix"] == {"e1": 0.9, "e0": -0.2}


def test_experts_that_are_not_named_take_no_part_and_shards_stay_shards(tmp_path: Path, command: Command) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=24, tie_word_embeddings=False, **shape))
    for name, model in (("base", base), ("e0", fine_tuned(base, 0)), ("e1", fine_tuned(base, 1))):
        model.save_pretrained(tmp_path / name)
    out = merged(tmp_path, LOW_RANK, shard_bytes=10_000)
    assert command("export", out, tmp_path / "mixed", "--mix", "e1=1", "--quiet")[0] == 0
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "mixed").eval()
    tokens = torch.randint(0, 24, (2, 5), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(tokens).logits, with_weights(out, [0.0, 1.0])(tokens).logits, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "mixed").glob("model-*"))) == len(list(out.glob("model-*"))) > 1


def test_the_static_merge_alone_has_the_same_bytes(tmp_path: Path, command: Command) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    assert command("export", out, tmp_path / "static", "--static", "--quiet") == (0, "", "")
    names = {path.name for path in (tmp_path / "static").iterdir()}
    assert names == {"manifest.json", "open_clip_config.json", "open_clip_model.safetensors"}
    weights = "open_clip_model.safetensors"
    assert (tmp_path / "static" / weights).read_bytes() == (out / weights).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mix", "e2=1"], "has no expert 'e2'; did you mean"),
        (["--mix", "e0"], "--mix e0: expected NAME=NUMBER"),
        (["--mix", "e0=1,e0=2"], "each name once"),
        (["--mix", "e0=nan"], "expected NAME=NUMBER"),
        ([], "say what to export, one of --static, --mix NAME=NUMBER,... and --peft"),
        (["--static", "--mix", "e0=1"], "say what to export, one of --static, --mix NAME=NUMBER,... and --peft"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, command: Command, options: list[str], message: str) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    before = tree(tmp_path)
    status, _, err = command("export", out, tmp_path / "mixed", *options)
    assert status == 2
    assert message in err
    assert tree(tmp_path) == before
