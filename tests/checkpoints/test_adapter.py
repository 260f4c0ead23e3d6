"""A LoRA adapter read over its base is what PEFT's ``merge_and_unload`` makes of the two."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hostile import cases, json_object, odd_json, refusal
from hypothesis import given
from hypothesis import strategies as st
from models import save_state
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from wemoe_plugin.checkpoints.checkpoint import open_checkpoint
from wemoe_plugin.checkpoints.header import read_header
from wemoe_plugin.checkpoints.ranges import RangeReader
from wemoe_plugin.checkpoints.reference import open_reference
from wemoe_plugin.checkpoints.sources import AdaptedTensor
from wemoe_plugin.checkpoints.tensors import read_as, read_tensors
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.merging.memory import fitting_chunk, operation_memory
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers warn about each other's and their own ways

LLAMA = LlamaConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=40,
    max_position_embeddings=16,
)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)


def adapt(base: nn.Module, directory: Path, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    """Save a base and an adapter with random factors; returns PEFT's own merge of the two."""
    torch.manual_seed(seed)
    base.save_pretrained(directory / "base")
    base.save_pretrained(directory / "copy")
    copied = type(base).from_pretrained(directory / "copy")
    model = get_peft_model(copied, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(directory / "merged")
    return load_file(directory / "merged" / "model.safetensors")


def adapted(directory: Path) -> dict[str, torch.Tensor]:
    return read_tensors(open_reference("base+adapter", lambda text: directory / text))


CASES: dict[str, tuple[type[nn.Module], Any, dict[str, Any]]] = {
    "linear layers": (LlamaForCausalLM, LLAMA, {"target_modules": ["q_proj", "down_proj"]}),
    "rank and alpha patterns": (
        LlamaForCausalLM,
        LLAMA,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 1, "layers.0.self_attn.q_proj": 9},
        },
    ),
    "rsLoRA": (LlamaForCausalLM, LLAMA, {"target_modules": ["up_proj"], "use_rslora": True}),
    "modules to save": (
        LlamaForCausalLM,
        LLAMA,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    ),
    "embeddings": (LlamaForCausalLM, LLAMA, {"target_modules": ["embed_tokens", "k_proj"]}),
    "Conv1D and fused QKV": (GPT2LMHeadModel, GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "biases of the factors": (
        GPT2LMHeadModel,
        GPT2,
        {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True},
    ),
    "biases": (GPT2LMHeadModel, GPT2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", CASES)
def test_is_what_peft_merges(tmp_path: Path, kind: str) -> None:
    model, config, options = CASES[kind]
    expected = adapt(model(config), tmp_path, **options)
    result = adapted(tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert result.keys() == base.keys()
    changed = [name for name in expected if not torch.equal(expected[name], base[name])]
    assert len(changed) >= 2
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-6)


def test_square_conv1d_layers_are_transposed_even_if_the_configuration_does_not_say_so(tmp_path: Path) -> None:
    expected = adapt(GPT2LMHeadModel(GPT2), tmp_path, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": False}))
    name = "transformer.h.0.attn.c_proj.weight"
    torch.testing.assert_close(adapted(tmp_path)[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_any_range_of_elements(tmp_path: Path, name: str) -> None:
    adapt(LlamaForCausalLM(LLAMA), tmp_path, target_modules=["q_proj", "embed_tokens"])
    source = open_reference("base+adapter", lambda text: tmp_path / text).tensors[name]
    assert isinstance(source, AdaptedTensor)
    whole = adapted(tmp_path)[name].reshape(-1)
    with RangeReader(dict.fromkeys(source.files)) as reader:
        for start, count in ((0, 1), (5, 40), (16, 16), (source.elements - 3, 3)):
            part = read_as(reader, source, start, count, torch.float32)
            torch.testing.assert_close(part, whole[start : start + count], rtol=1e-6, atol=1e-6)


def test_a_merge_of_adapters_is_the_merge_of_the_merged_models(tmp_path: Path) -> None:
    base = LlamaForCausalLM(LLAMA)
    states = []
    for k, targets in enumerate((["q_proj"], ["gate_proj", "down_proj"])):
        states.append(adapt(base, tmp_path / f"{k}", seed=k, target_modules=targets))
        (tmp_path / f"{k}" / "adapter").rename(tmp_path / f"lora{k}")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: base+lora0}, {model: base+lora1}]\nmerge_method: task_arithmetic\n"
        "parameters: {lambda: 0.4}\nrules: [{match: mlp, merge_method: wemoe}]\n"
    )
    source = load_recipe(tmp_path / "recipe.yaml")
    assert [entry.name for entry in source.recipe.models] == ["lora0", "lora1"]
    merge(source, plan_merge(source), tmp_path / "out")
    result, start = load_file(tmp_path / "out" / "model.safetensors"), base.state_dict()
    for name, tensor in result.items():
        expected = start[name] + 0.4 * sum(state[name] - start[name] for state in states)
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    vectors = load_file(tmp_path / "out" / "wemoe.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    difference = torch.stack([state[name] - start[name] for state in states])
    torch.testing.assert_close(vectors[f"{name}.task_vectors"], difference, rtol=1e-4, atol=1e-6)


def test_the_predicted_memory_counts_the_adapter(tmp_path: Path) -> None:
    adapt(LlamaForCausalLM(LLAMA), tmp_path, target_modules=["q_proj"])
    recipe = "base_model: base\nmodels: [{model: MODEL}]\nmerge_method: task_arithmetic\n"
    needs = {}
    for model in ("merged", "base+adapter"):
        (tmp_path / "recipe.yaml").write_text(recipe.replace("MODEL", model))
        plan = plan_merge(load_recipe(tmp_path / "recipe.yaml"))
        operation = next(o for o in plan.operations if o.output.name == "model.layers.0.self_attn.q_proj.weight")
        needs[model] = operation_memory(operation, 256, "F32")
    change, factors = 2 * 256, 2 * 4 * 16
    through_torch = 4 * (2 * 256 + 256)  # adapters need it: a task vector, its product and the rounded result
    assert needs["base+adapter"] == needs["merged"] + through_torch + 4 * (change + factors)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(directory: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = directory / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_state(state, path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: change_config(d, use_dora=True), "uses use_dora, with which the change"),
        (lambda d: change_config(d, peft_type="IA3"), "a IA3 adapter; only LoRA can be merged"),
        (lambda d: change_config(d, layer_replication=[[0, 1], [0, 1]]), "uses layer_replication"),
        (lambda d: change_config(d, init_lora_weights="pissa"), "was started with init_lora_weights 'pissa'"),
        (lambda d: (d / "adapter" / "adapter_config.json").unlink(), "adapter_config.json is absent"),
        (lambda d: (d / "adapter" / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is absent"),
        (
            lambda d: change_weights(d, lambda s: s.update({"base_model.model.ghost.weight": torch.ones(1)})),
            "nothing uses 'base_model.model.ghost.weight'; the base has no 'ghost.weight'",
        ),
        (
            lambda d: change_weights(d, lambda s: s.update({"base_model.model.x.lora_A.weight": torch.ones(4, 2)})),
            "nothing uses 'base_model.model.x.lora_A.weight'; the base has no 'x.weight'",
        ),
        (
            lambda d: change_weights(d, lambda s: s.pop(f"{FIRST}.lora_B.weight")),
            f"'{FIRST}.lora_A.weight' has no other factor beside it",
        ),
        (
            lambda d: change_weights(d, lambda s: s.update({f"{FIRST}.lora_A.weight": torch.ones(4, 7)})),
            "do not fit 'model.layers.0.self_attn.q_proj.weight' [16, 16]",
        ),
        (
            lambda d: change_weights(d, lambda s: s.update(odd=torch.ones(1))),
            "'odd' does not begin with base_model.model.",
        ),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    adapt(LlamaForCausalLM(LLAMA), tmp_path, target_modules=["q_proj"])
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        adapted(tmp_path)
    assert message in str(caught.value)


def test_every_field_of_pefts_configuration_is_understood_or_refused() -> None:
    """A field this package has not heard of is refused once it is used; the ones it follows must still exist."""
    from wemoe_plugin.checkpoints.adapter import _UNDERSTOOD

    assert set(_UNDERSTOOD) <= set(vars(LoraConfig())), peft.__version__


def test_a_local_hub_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout huggingface_hub writes: blobs aside, a snapshot per commit, a file per branch."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    commit, older = "a" * 40, "b" * 40
    (repo / "refs" / "main").write_text(commit)
    (repo / "refs" / "v1").write_text(older)
    for name in (commit, older):
        LlamaForCausalLM(LLAMA).save_pretrained(repo / "snapshots" / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for text, name in (("someone/tiny", commit), ("someone/tiny@v1", older), (f"someone/tiny@{older}", older)):
        found = open_reference(text, lambda path: tmp_path / path)
        assert found.path.resolve() == (repo / "snapshots" / name).resolve()
        assert found.tensors.keys() == open_checkpoint(repo / "snapshots" / name).tensors.keys()
    with pytest.raises(CheckpointError, match="someone/else is not in the hub's local cache"):
        open_reference("someone/else", lambda path: tmp_path / path)
    assert read_header(repo / "snapshots" / commit / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of a base and its adapter, and the adapter's configuration as JSON by field."""
    directory = tmp_path_factory.mktemp("adapter")
    adapt(LlamaForCausalLM(LLAMA), directory, target_modules=["q_proj"])
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    return directory, {name: json.dumps(value) for name, value in config.items()}


FIELDS = [
    *("peft_type", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "target_modules", "use_rslora", "bias"),
    *("fan_in_fan_out", "init_lora_weights", "modules_to_save", "auto_mapping", "layers_to_transform", "eva_config"),
    *("runtime_config", "loftq_config", "use_dora", "task_type", "self", "never heard of"),
]


@given(st.dictionaries(st.sampled_from(FIELDS), odd_json, min_size=1, max_size=2), st.booleans())
@cases("adapters")
def test_any_configuration_is_read_or_refused(
    plain: tuple[Path, dict[str, str]], changes: dict[str, str], alone: bool
) -> None:
    directory, fields = plain
    texts = changes if alone else {**fields, **changes}
    config = directory / "adapter" / "adapter_config.json"
    config.write_text(json_object([(f'"{name}"', text) for name, text in texts.items()]))

    def check() -> None:
        found = open_reference("base+adapter", lambda text: directory / text)
        scales = [tensor.scale for tensor in found.tensors.values() if isinstance(tensor, AdaptedTensor)]
        assert scales
        assert all(math.isfinite(scale) for scale in scales)

    message = refusal(check, CheckpointError)
    assert message is None or message.startswith(f"{directory / 'adapter'}: ")
    assert message is None or len(message.splitlines()) == 1


def test_a_limit_on_memory_does_not_count_the_factors_for_every_element(tmp_path: Path) -> None:
    adapt(LlamaForCausalLM(LLAMA), tmp_path, target_modules=["q_proj"])
    (tmp_path / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: base+adapter}]\nmerge_method: task_arithmetic\n"
    )
    operations = plan_merge(load_recipe(tmp_path / "recipe.yaml")).operations
    limit = max(operation_memory(operation, 100, "F32") for operation in operations)
    assert fitting_chunk(operations, "F32", 1000, limit) == 100
