"""An output directory is an ordinary checkpoint to everyone else and a WEMoE model to us."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from architectures import ROWS, family
from models import open_clip_family, save_state, transformers_family
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPModel, LlamaConfig, LlamaForCausalLM

from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.modeling.attach import attach
from wemoe_plugin.modeling.loading import load_model
from wemoe_plugin.modeling.wemoe import wemoe_modules
from wemoe_plugin.pipeline.export import export
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe

HEAD = (
    "base_model: base\nmodels: [{model: e0}, {model: e1}]\nmerge_method: task_arithmetic\nparameters: {lambda: 0.3}\n"
)
DENSE = "rules: [{match: mlp, merge_method: wemoe}]\n"


def merged(directory: Path, text: str) -> Path:
    (directory / "recipe.yaml").write_text(HEAD + text)
    source = load_recipe(directory / "recipe.yaml")
    merge(source, plan_merge(source), directory / "out")
    return directory / "out"


def by_hand(model: nn.Module, experts: list[nn.Module]) -> nn.Module:
    """θ₀ + 0.3 Σ (θₖ − θ₀), in place."""
    states = [{n: t.clone() for n, t in expert.state_dict().items()} for expert in experts]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in states[0]:
                tensor.copy_(tensor + 0.3 * sum(state[name] - tensor for state in states))
    return model


def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def set_routers(model: nn.Module, weights: list[float]) -> None:
    """Let every router give these weights for any input."""
    with torch.no_grad():
        for _, module in wemoe_modules(model):
            for parameter in module.router.parameters():
                parameter.zero_()
            last = module.router.constant if module.router.output is None else module.router.output.bias
            last.copy_(torch.tensor(weights))  # type: ignore[union-attr]


def test_plain_open_clip_loads_task_arithmetic(tmp_path: Path) -> None:
    base, *experts = open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    plain = open_clip.create_model(f"local-dir:{out}").eval()
    ours = load_model(out)
    texts = torch.randint(1, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    expected = by_hand(base, experts)(images(), texts)
    for model in (plain, ours):
        for result, truth in zip(model(images(), texts)[:2], expected[:2], strict=True):
            torch.testing.assert_close(result, truth, rtol=0, atol=1e-5)
    assert [path for path, _ in wemoe_modules(ours)] == [
        *(f"visual.transformer.resblocks.{i}.mlp" for i in range(2)),
        *(f"transformer.resblocks.{i}.mlp" for i in range(2)),
    ]


def test_plain_transformers_loads_task_arithmetic(tmp_path: Path) -> None:
    base, towers = transformers_family(tmp_path)
    out = merged(tmp_path, DENSE)
    by_hand(base.vision_model, list(towers))
    texts = {"input_ids": torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(0))}
    expected = base(pixel_values=images(), **texts).logits_per_image
    for model in (CLIPModel.from_pretrained(out), load_model(out)):
        result = model(pixel_values=images(), **texts).logits_per_image
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "form",
    [
        "",
        ", parameters: {task_vectors: {form: low_rank, rank: 32}}",
        ", parameters: {router: {depth: 1, shared: true}}",
    ],
)
def test_one_hot_routing_recovers_an_expert_whose_mlps_alone_moved(tmp_path: Path, form: str) -> None:
    base, towers = transformers_family(tmp_path)
    for k, tower in enumerate(towers):
        for name, tensor in tower.state_dict().items():
            if ".mlp." not in name:
                tensor.copy_(base.vision_model.state_dict()[name])
        tower.save_pretrained(tmp_path / f"e{k}")
    out = merged(tmp_path, f"rules: [{{match: mlp, merge_method: wemoe{form}}}]\n")
    model = load_model(out)
    assert len({id(m.router) for _, m in wemoe_modules(model)}) == (1 if "shared" in form else 2)
    for k, tower in enumerate(towers):
        set_routers(model, torch.eye(2)[k].tolist())
        result = model.vision_model(pixel_values=images()).last_hidden_state
        torch.testing.assert_close(result, tower(pixel_values=images()).last_hidden_state, rtol=0, atol=1e-4)


def test_attention_of_transformers_can_be_upscaled(tmp_path: Path) -> None:
    base, towers = transformers_family(tmp_path)
    out = merged(tmp_path, "rules: [{match: attention, merge_method: wemoe}]\n")
    model = load_model(out)
    assert len(list(wemoe_modules(model))) == 2
    expected = by_hand(base.vision_model, list(towers))(pixel_values=images()).last_hidden_state
    result = model.vision_model(pixel_values=images()).last_hidden_state
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    set_routers(model, [1.0, 0.0])
    assert not torch.allclose(model.vision_model(pixel_values=images()).last_hidden_state, expected, atol=1e-3)


def test_a_vision_tower_can_be_the_base(tmp_path: Path) -> None:
    base, towers = transformers_family(tmp_path)
    (tmp_path / "base").rename(tmp_path / "clip")
    tower = type(towers[0])(towers[0].config).eval()
    tower.load_state_dict(base.vision_model.state_dict())
    tower.save_pretrained(tmp_path / "base")
    model = load_model(merged(tmp_path, DENSE))
    expected = by_hand(tower, list(towers))(pixel_values=images()).last_hidden_state
    torch.testing.assert_close(model(pixel_values=images()).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_any_model_whose_mlps_are_linear_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=50, max_position_embeddings=32)
    models = [LlamaForCausalLM(config).eval() for _ in range(3)]
    for name, model in zip(("base", "e0", "e1"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    model = load_model(merged(tmp_path, DENSE))
    assert [path for path, _ in wemoe_modules(model)] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    tokens = torch.randint(0, 50, (3, 6))
    expected = by_hand(models[0], models[1:])(input_ids=tokens).logits
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0, atol=1e-4)


def test_attach_upscales_a_model_you_built(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    model = open_clip.create_model(f"local-dir:{out}").eval()
    assert attach(model, out) is model
    torch.testing.assert_close(model.encode_image(images()), load_model(out).encode_image(images()))
    assert len(list(wemoe_modules(model))) == 4


def test_a_merge_without_rules_loads_as_the_librarys_own_model(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, "")
    assert list(wemoe_modules(load_model(out))) == []
    assert not (out / "wemoe.safetensors").exists()


def test_the_directory_is_complete_and_described(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    files = {path.name for path in out.iterdir()}
    assert files == {
        *("README.md", "manifest.json", "open_clip_config.json", "open_clip_model.safetensors", "recipe.yaml"),
        *("routers.safetensors", "wemoe.safetensors", "wemoe_config.json"),
    }
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert all(entry["bytes"] == (out / name).stat().st_size for name, entry in manifest["files"].items())
    assert str(tmp_path) not in "".join(p.read_text() for p in out.iterdir() if p.suffix in (".json", ".md", ".yaml"))


def test_the_dtype_in_the_configuration_is_that_of_the_weights(tmp_path: Path) -> None:
    transformers_family(tmp_path)
    out = merged(tmp_path, "out_dtype: bfloat16\n")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert CLIPModel.from_pretrained(out).dtype == torch.bfloat16


def test_sharded_outputs_load(tmp_path: Path) -> None:
    transformers_family(tmp_path)
    whole = load_model(merged(tmp_path, DENSE))
    source = load_recipe(tmp_path / "recipe.yaml")
    merge(source, plan_merge(source, shard_bytes=40_000), tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 4
    sharded = load_model(tmp_path / "sharded")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, sharded.state_dict()[name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "wemoe_config.json").write_text("{"), "wemoe_config.json: Invalid JSON"),
        (lambda out: (out / "wemoe.safetensors").unlink(), "wemoe.safetensors: no such file"),
        (lambda out: (out / "routers.safetensors").write_bytes(b"junk"), "routers.safetensors: cannot be read"),
        (
            lambda out: (out / "wemoe_config.json").write_text(
                (out / "wemoe_config.json").read_text().replace("resblocks.0.mlp", "resblocks.9.mlp")
            ),
            "this CLIP has no layer of its own for 'transformer.resblocks.9.mlp.c_fc'",
        ),
        (
            lambda out: (out / "wemoe_config.json").write_text(
                (out / "wemoe_config.json").read_text().replace('"version": 2', '"version": 1')
            ),
            "version 1; this package reads version 2: merge the recipe again",
        ),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    damage(out)
    with pytest.raises(CheckpointError) as caught:
        load_model(out)
    assert message in str(caught.value)


def test_attaching_to_another_model_is_refused(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    with pytest.raises(CheckpointError, match="this Linear has no layer of its own for 'transformer"):
        attach(nn.Linear(2, 2), out)


def test_routers_are_stored_under_the_paths_of_their_modules(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    names = {key.partition(":")[0] for key in load_file(out / "routers.safetensors")}
    assert names == {path for path, _ in wemoe_modules(load_model(out))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loading_in_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    result = load_model(out, dtype=dtype).encode_image(images().to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), load_model(out).encode_image(images()), rtol=0.1, atol=0.1)


def test_a_list_of_modules_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    transformers_family(tmp_path)
    rule = "rules: [{match: vision_model.encoder.layers, merge_method: wemoe}]\n"
    with pytest.raises(PlanError, match=r"is a list of modules and has no forward pass; match its members"):
        merged(tmp_path, rule)
    assert not (tmp_path / "out").exists()


def test_attaching_twice_is_refused(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    with pytest.raises(CheckpointError, match="is upscaled already; attach once"):
        attach(load_model(out), out)


def test_a_base_that_lacks_weights_is_refused_not_filled_at_random(tmp_path: Path) -> None:
    transformers_family(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    state = load_file(path)
    del state["visual_projection.weight"]
    save_state(state, path)
    with pytest.raises(CheckpointError, match=r"has no fitting 'visual_projection\.weight', which a CLIPModel needs"):
        load_model(merged(tmp_path, DENSE))


def rewrite(out: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((out / "wemoe_config.json").read_text())
    edit(config)
    (out / "wemoe_config.json").write_text(json.dumps(config))


def replace_tensor(out: Path, end: str, change: Callable[[Tensor], Tensor]) -> None:
    state = load_file(out / "wemoe.safetensors")
    name = next(name for name in state if name.endswith(end))
    save_state(state | {name: change(state[name])}, out / "wemoe.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: rewrite(out, lambda c: next(iter(c["routers"].values())).update(width=10**6)), "another shape"),
        (lambda out: rewrite(out, lambda c: next(iter(c["routers"].values())).update(width=2**70)), "less than"),
        (lambda out: rewrite(out, lambda c: c["modules"][0].update(argument=5)), "argument"),
        (lambda out: rewrite(out, lambda c: c["modules"][0].update(lambdas=[float("nan"), 0.3])), "finite"),
        (lambda out: rewrite(out, lambda c: c.update(experts=["e0", "e0"])), "two experts have one name"),
        (lambda out: rewrite(out, lambda c: c.update(experts=["e0", ".."])), "cannot be the name of an expert"),
        (lambda out: rewrite(out, lambda c: c["modules"][0]["layers"][0].update(ranks=[3, 10**9])), "must be"),
        (lambda out: replace_tensor(out, ".down", lambda t: t.unsqueeze(0)), "must be F64 or F32"),
        (lambda out: replace_tensor(out, ".down", lambda t: t.int()), "must be F64 or F32"),
    ],
)
def test_what_a_damaged_directory_claims_is_not_believed(tmp_path: Path, damage: Any, message: str) -> None:
    open_clip_family(tmp_path)
    out = merged(
        tmp_path, "rules: [{match: mlp, merge_method: wemoe, parameters: {task_vectors: {form: low_rank, rank: 3}}}]\n"
    )
    damage(out)
    for read in (load_model, lambda path: export(path, tmp_path / "mixed", {"e0": 1.0})):
        if message == "another shape" and read is not load_model:
            continue  # a mix needs no routers
        with pytest.raises(CheckpointError, match=message):
            read(out)


@pytest.mark.parametrize("change", [lambda t: t.flip(1), lambda t: t - 1, lambda t: t + 10**6, torch.zeros_like])
def test_positions_out_of_place_are_refused(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    open_clip_family(tmp_path)
    out = merged(
        tmp_path,
        "rules: [{match: mlp, merge_method: wemoe, parameters: {task_vectors: {form: sparse, density: 1.0}}}]\n",
    )
    replace_tensor(out, ".indices", change)
    for read in (load_model, lambda path: export(path, tmp_path / "mixed", {"e0": 1.0})):
        with pytest.raises(CheckpointError, match="positions must ascend, and lie in a matrix of"):
            read(out)


def test_attaching_is_all_or_nothing(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    out = merged(tmp_path, DENSE)
    model = open_clip.create_model(f"local-dir:{out}").eval()
    state = load_file(out / "wemoe.safetensors")
    last = list(state)[-1]
    save_state({name: tensor for name, tensor in state.items() if name != last}, out / "wemoe.safetensors")
    with pytest.raises(CheckpointError, match="are absent"):
        attach(model, out)
    assert list(wemoe_modules(model)) == []
    save_state(state, out / "wemoe.safetensors")
    attach(model, out)


def test_layers_that_the_library_keeps_in_float32(tmp_path: Path) -> None:
    """T5 in half precision keeps the last layer of its MLPs as it was."""
    family(ROWS["T5"], tmp_path, "DenseReluDense")
    model = load_model(merged(tmp_path, DENSE), dtype=torch.float16)
    tokens = torch.randint(1, 24, (2, 5))
    assert model(input_ids=tokens, decoder_input_ids=tokens).logits.isfinite().all()
