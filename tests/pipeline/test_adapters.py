"""An exported adapter is the expert's low-rank task vectors, to PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import ROWS, family, same, save
from models import open_clip_family
from safetensors.torch import load_file, save_file
from snapshots import tree

from wemoe_plugin.checkpoints.reference import open_reference
from wemoe_plugin.checkpoints.tensors import read_tensors
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.modeling.loading import load_static
from wemoe_plugin.pipeline.adapters import _task_type, export_adapters
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe

Command = Callable[..., tuple[int, str, str]]
HEAD = (
    "base_model: base\nmodels: [{model: e0}, {model: e1}]\nmerge_method: task_arithmetic\nparameters: {lambda: 0.3}\n"
)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it


def merged(directory: Path, form: str = "{form: low_rank, rank: 1000}", match: str = "mlp") -> Path:
    rule = f"rules: [{{match: {match}, merge_method: wemoe, parameters: {{task_vectors: {form}}}}}]\n"
    (directory / "recipe.yaml").write_text(HEAD + rule)
    source = load_recipe(directory / "recipe.yaml")
    merge(source, plan_merge(source), directory / "out")
    return directory / "out"


def merged_again(directory: Path, expert: str, rules: str = "[]") -> Path:
    """The merge of the base with an exported adapter."""
    (directory / "again.yaml").write_text(
        f"base_model: base\nmodels: [{{model: base+adapters/{expert}}}]\n"
        f"merge_method: task_arithmetic\nrules: {rules}\n"
    )
    source = load_recipe(directory / "again.yaml")
    merge(source, plan_merge(source), directory / "again")
    return directory / "again"


@pytest.mark.parametrize("row", ["Llama", "GPT-2", "ViT", "DINOv2", "T5", "BERT", "CLIP", "open_clip"])
def test_with_its_adapter_the_base_is_the_expert(tmp_path: Path, row: str) -> None:
    """Of full rank, and of experts that moved in their MLPs only."""
    base, experts = family(ROWS[row], tmp_path, ROWS[row].mlp)
    made = export_adapters(merged(tmp_path), tmp_path / "adapters")
    assert set(made) == {"e0", "e1"}
    for name, expert in zip(made, experts, strict=True):
        model = peft.PeftModel.from_pretrained(load_static(tmp_path / "base"), tmp_path / "adapters" / name)
        assert len([n for n, _ in model.named_parameters() if "lora_A" in n]) == made[name]
        inner = model.base_model.model
        assert same(inner, expert)
        assert not same(inner, base)
    assert same(model.merge_and_unload(), experts[-1])


@pytest.mark.parametrize(
    ("row", "task_type"), [("Llama", "CAUSAL_LM"), ("GPT-2", "CAUSAL_LM"), ("T5", "SEQ_2_SEQ_LM"), ("BERT", None)]
)
def test_adapters_are_written_alike_for_everybody_and_say_what_they_are_for(
    tmp_path: Path, row: str, task_type: str | None
) -> None:
    family(ROWS[row], tmp_path, ROWS[row].mlp)
    out = merged(tmp_path)
    for name in ("once", "again"):
        export_adapters(out, tmp_path / name)
    written = tmp_path / "once" / "e0" / "adapter_config.json"
    config = json.loads(written.read_text())
    assert config["task_type"] == task_type
    assert config["target_modules"] == sorted(config["target_modules"])
    assert written.read_bytes() == (tmp_path / "again" / "e0" / "adapter_config.json").read_bytes()
    assert (written.parent / "adapter_model.safetensors").stat().st_mode == written.stat().st_mode


def test_ranks_may_differ_and_the_factors_are_those_of_the_directory(tmp_path: Path) -> None:
    base, _ = family(ROWS["Llama"], tmp_path, ".")
    out = merged(tmp_path, "{form: low_rank, energy: 0.6}")
    config = json.loads((out / "wemoe_config.json").read_text())
    ranks = {rank for module in config["modules"] for layer in module["layers"] for rank in layer["ranks"]}
    assert len(ranks) > 1
    export_adapters(out, tmp_path / "adapters")
    settings = json.loads((tmp_path / "adapters" / "e1" / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == settings["r"]
    assert settings["alpha_pattern"] == settings["rank_pattern"] != {}
    assert settings["base_model_name_or_path"] == "base"
    model: Any = peft.PeftModel.from_pretrained(load_static(tmp_path / "base"), tmp_path / "adapters" / "e1")
    stored = load_file(out / "wemoe.safetensors")
    layer = config["modules"][1]["layers"][2]
    name = f"{config['modules'][1]['path']}.{layer['path']}"
    before, rank = layer["ranks"][0], layer["ranks"][1]
    down, up = (stored[f"{name}.weight.task_vectors.{part}"][before : before + rank] for part in ("down", "up"))
    found = model.merge_and_unload().get_submodule(name).weight
    expected = base.get_submodule(name).weight + up.T @ down
    torch.testing.assert_close(found, expected)  # type: ignore[arg-type]


def test_names_that_are_ends_of_other_names(tmp_path: Path) -> None:
    """open_clip's text tower is ``transformer``, its vision tower ``visual.transformer``; each layer keeps its rank."""
    base, experts = family(ROWS["open_clip"], tmp_path, ROWS["open_clip"].mlp)
    state = base.state_dict()
    for name, tensor in experts[0].state_dict().items():
        if name.startswith("visual.transformer") and name.endswith(("c_fc.weight", "c_proj.weight")):
            tensor.copy_(state[name] + torch.outer(torch.ones(tensor.shape[0]), torch.ones(tensor.shape[1])) * 0.01)
    save(experts[0], tmp_path / "moved")
    (tmp_path / "e0").rename(tmp_path / "old")
    (tmp_path / "moved").rename(tmp_path / "e0")
    out = merged(tmp_path, "{form: low_rank, energy: 0.999999}")
    export_adapters(out, tmp_path / "adapters")
    model: Any = peft.PeftModel.from_pretrained(load_static(tmp_path / "base"), tmp_path / "adapters" / "e0")
    ranks = {n: p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert {rank for name, rank in ranks.items() if "visual" in name} == {1}
    assert {rank for name, rank in ranks.items() if "visual" not in name} != {1}
    assert same(model.base_model.model, experts[0])
    assert same(load_static(merged_again(tmp_path, "e0")), experts[0])
    rule = "transformer.resblocks.*.mlp"
    (tmp_path / "text").mkdir()
    for name in ("base", "e0", "e1"):
        (tmp_path / "text" / name).symlink_to(tmp_path / name)
    export_adapters(merged(tmp_path / "text", match=rule), tmp_path / "text" / "adapters")
    model = peft.PeftModel.from_pretrained(load_static(tmp_path / "base"), tmp_path / "text" / "adapters" / "e0")
    assert not any("visual" in name for name, _ in model.named_parameters() if "lora_A" in name)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # merging into o_proj is not possible, says PEFT
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_layers_without_a_bias_beside_some_with_one(tmp_path: Path) -> None:
    """Qwen2's attention: what has no bias gets none, so that the adapter can be an input again."""
    _, experts = family(ROWS["Qwen2"], tmp_path, r"self_attn\.._proj")
    export_adapters(merged(tmp_path, match="attention"), tmp_path / "adapters")
    model: Any = peft.PeftModel.from_pretrained(load_static(tmp_path / "base"), tmp_path / "adapters" / "e1")
    assert same(model.base_model.model, experts[1])
    assert same(load_static(merged_again(tmp_path, "e1")), experts[1])


def test_the_command(tmp_path: Path, command: Command) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, "{form: low_rank, rank: 2}", "visual.**.mlp")
    status, said, err = command("export", out, tmp_path / "adapters", "--peft")
    assert (status, err) == (0, "")
    assert said.splitlines() == [f"{name}: 4 layers: {tmp_path / 'adapters' / name}" for name in ("e0", "e1")]
    manifest = json.loads((tmp_path / "adapters" / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        f"{name}/{file}" for name in ("e0", "e1") for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert command("export", out, tmp_path / "adapters", "--peft")[0] == 2
    assert command("export", out, tmp_path / "adapters", "--peft", "--force", "--quiet") == (0, "", "")
    (tmp_path / "adapters" / "e0" / "mine").write_text("")
    status, _, err = command("export", out, tmp_path / "adapters", "--peft", "--force")
    assert status == 2
    assert "this holds e0/mine as well" in err


def test_other_forms_are_no_adapters(tmp_path: Path, command: Command) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, "{form: dense}")
    before = tree(tmp_path)
    status, _, err = command("export", out, tmp_path / "adapters", "--peft")
    assert status == 2
    assert "has no low-rank task vectors; only those are LoRA adapters" in err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("row", "weight"),
    [("open_clip", "transformer.resblocks.0.mlp.c_fc"), ("ViT", "vit.encoder.layer.0.intermediate.dense")],
)
def test_an_adapter_can_be_an_input_again(tmp_path: Path, row: str, weight: str) -> None:
    """With the base, as any adapter; its biases, and its own factors for a low-rank rule, included.

    The adapter of a ViT names modules as transformers 5 does, not as the base's file.
    """
    _, experts = family(ROWS[row], tmp_path, ROWS[row].mlp)
    export_adapters(merged(tmp_path), tmp_path / "adapters")
    rules = "[{match: mlp, merge_method: wemoe, parameters: {task_vectors: {form: low_rank, rank: 1000}}}]"
    assert same(load_static(merged_again(tmp_path, "e1", rules)), experts[1])
    first, second = (load_file(tmp_path / name / "wemoe.safetensors") for name in ("out", "again"))
    name = f"{weight}.weight.task_vectors.down"
    assert torch.equal(first[name][len(first[name]) // 2 :], second[name])


@pytest.mark.parametrize("outer", ["", "vit."])
def test_an_adapter_of_the_model_inside_of_a_classifier(tmp_path: Path, outer: str) -> None:
    """Named by modules that the library renames, and without what the classifier's file puts before them."""
    base, _ = family(ROWS["ViT"], tmp_path, ".")
    factors = torch.randn(2, 16), torch.randn(32, 2)
    (tmp_path / "lora").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["fc1"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    names = [f"base_model.model.{outer}layers.1.mlp.fc1.lora_{which}.weight" for which in "AB"]
    save_file(dict(zip(names, factors, strict=True)), tmp_path / "lora" / "adapter_model.safetensors")
    found = read_tensors(open_reference("base+lora", lambda text: tmp_path / text))
    expected = base.state_dict()["vit.layers.1.mlp.fc1.weight"] + factors[1] @ factors[0]
    torch.testing.assert_close(found["vit.encoder.layer.1.intermediate.dense.weight"], expected)


def test_a_task_type_is_for_models_that_take_what_peft_gives_them() -> None:
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 24, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with torch.device("meta"):
        whisper = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**shape, **heads))
    assert _task_type(whisper) is None
    assert _task_type(ROWS["T5"].build()) == "SEQ_2_SEQ_LM"
