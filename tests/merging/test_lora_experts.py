"""LoRA experts: their own factors are the task vectors, and no dense change is built for them."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import route, same
from models import fine_tuned, save_state
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from wemoe_plugin.checkpoints.ranges import RangeReader
from wemoe_plugin.checkpoints.sources import AdaptedTensor, Source
from wemoe_plugin.errors import CheckpointError
from wemoe_plugin.merging import tensor_worker
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.merging.survey import settle
from wemoe_plugin.merging.tensor_worker import TensorWorker
from wemoe_plugin.modeling.loading import load_model
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe

Command = Callable[..., tuple[int, str, str]]
Factors = Mapping[str, tuple[Tensor, Tensor]]
LLAMA = LlamaConfig(
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"vocab_size": 24, "max_position_embeddings": 16, "tie_word_embeddings": False},
)
LAYERS = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_proj", "up_proj", "down_proj")]
RANK_EIGHT = "{form: low_rank, rank: 8}"


def base_model(directory: Path, seed: int = 0, name: str = "base") -> nn.Module:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LLAMA).eval()
    model.save_pretrained(directory / name)
    return model


def adapter(
    directory: Path, model: nn.Module, layers: list[str], rank: int | Mapping[str, int], seed: int, **config: Any
) -> Factors:
    """An adapter as PEFT saves it; returns (A, B) by layer."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in layers:
        module = model.get_submodule(layer)
        inner, outer = module.weight.shape if "Conv1D" in type(module).__name__ else module.weight.shape[::-1]
        r = rank if isinstance(rank, int) else next(value for key, value in rank.items() if layer.endswith(key))
        factors[layer] = torch.randn(r, inner, generator=generator), torch.randn(outer, r, generator=generator)
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": layers, **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    keys = [f"base_model.model.{layer}.lora_{which}.weight" for layer in layers for which in "AB"]
    values = [factor for layer in layers for factor in factors[layer]]
    save_state(dict(zip(keys, values, strict=True)), directory / "adapter_model.safetensors")
    return factors


def with_change(model: nn.Module, factors: Factors, scale: float) -> nn.Module:
    result = copy.deepcopy(model)
    with torch.no_grad():
        for layer, (a, b) in factors.items():
            weight = result.get_submodule(layer).weight
            weight.add_((scale * b @ a) if weight.shape == (len(b), a.shape[1]) else (scale * b @ a).T)
    return result


def merged(directory: Path, models: list[str], task_vectors: str = RANK_EIGHT, match: str = "mlp") -> dict[str, Tensor]:
    """The task vectors that a merge of these stores."""
    (directory / "recipe.yaml").write_text(
        f"base_model: base\nmodels: [{', '.join(f'{{model: {model}}}' for model in models)}]\n"
        "merge_method: task_arithmetic\nparameters: {lambda: 0.3}\nrules:\n"
        f"  - {{match: '{match}', merge_method: wemoe, parameters: {{task_vectors: {task_vectors}}}}}\n"
    )
    source = load_recipe(directory / "recipe.yaml")
    merge(source, plan_merge(source), directory / "out")
    return load_file(directory / "out" / "wemoe.safetensors")


def ranks_of(directory: Path) -> dict[str, list[int]]:
    config = json.loads((directory / "out" / "wemoe_config.json").read_text())
    layers = [(module["path"], layer) for module in config["modules"] for layer in module["layers"]]
    return {f"{path}.{layer['path']}": layer["ranks"] for path, layer in layers}


def kept(stored: Mapping[str, Tensor], layer: str, *parts: str) -> list[Tensor]:
    return [stored[f"{layer}.weight.task_vectors.{part}"] for part in parts]


def dense_changes_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors whose LoRA change is built while one is compressed or its singular values are taken."""
    read_as, within, found = tensor_worker.read_as, [0], []

    def watching(reader: RangeReader, source: Source, *args: Any) -> Tensor:
        if within[0] and isinstance(source, AdaptedTensor):
            found.append(source.name)
        return read_as(reader, source, *args)

    def marked(name: str) -> None:
        method = getattr(TensorWorker, name)

        def marking(*args: Any) -> Any:
            within[0] += 1
            try:
                return method(*args)
            finally:
                within[0] -= 1

        monkeypatch.setattr(TensorWorker, name, marking)

    marked("compressed")
    marked("singular_values")
    monkeypatch.setattr(tensor_worker, "read_as", watching)
    monkeypatch.setattr("wemoe_plugin.merging.executor.available_processors", lambda: 1)  # one thread, one mark
    monkeypatch.setattr("wemoe_plugin.merging.survey.available_processors", lambda: 1)
    return found


def test_factors_are_stored_as_they_are_one_expert_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    found, base = dense_changes_read(monkeypatch), base_model(tmp_path)
    own = [
        adapter(tmp_path / "a", base, LAYERS, 4, 0, lora_alpha=6),
        adapter(tmp_path / "b", base, LAYERS, 2, 1, r=2, lora_alpha=1),
    ]
    scales = [6 / 4, 1 / 2]
    stored = merged(tmp_path, ["base+a", "base+b"])
    for layer in LAYERS:
        down, up, norms = kept(stored, layer, "down", "up", "norms")
        assert torch.equal(down, torch.cat([factors[layer][0] for factors in own]))
        assert torch.equal(up, torch.cat([s * f[layer][1].T for s, f in zip(scales, own, strict=True)]))
        changes = [s * (f[layer][1] @ f[layer][0]).double() for s, f in zip(scales, own, strict=True)]
        torch.testing.assert_close(norms[:, 0].double(), torch.stack([change.norm() for change in changes]))
        assert norms[:, 1].tolist() == [0.0, 0.0]
        assert ranks_of(tmp_path)[layer] == [4, 2]
    assert found == []
    model = load_model(tmp_path / "out")
    for k in range(2):
        route(model, torch.eye(2)[k])
        assert same(model, with_change(base, own[k], scales[k]))
    assert command("verify", tmp_path / "out")[0] == 0


def test_patterns_and_rslora_decide_about_ranks_and_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, base = dense_changes_read(monkeypatch), base_model(tmp_path)
    ranks = {"layers.1.mlp.up_proj": 3, "gate_proj": 5, "": 4}
    own = adapter(
        *(tmp_path / "a", base, LAYERS, ranks, 0),
        rank_pattern={"layers.1.mlp.up_proj": 3, "gate_proj": 5},
        alpha_pattern={"layers.0.mlp.gate_proj": 9, "down_proj": 2},
        use_rslora=True,
    )
    stored = merged(tmp_path, ["base+a"])
    for layer in LAYERS:
        a, b = own[layer]
        alpha = {"model.layers.0.mlp.gate_proj": 9, LAYERS[2]: 2, LAYERS[5]: 2}.get(layer, 4)
        down, up = kept(stored, layer, "down", "up")
        assert torch.equal(down, a)
        assert torch.equal(up, b.T * (alpha / math.sqrt(len(a))))
        assert ranks_of(tmp_path)[layer] == [len(a)]
    assert found == []


def test_conv1d_weights_stand_the_other_way_round(tmp_path: Path, command: Command) -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 24, "n_positions": 16}
    base = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    base.save_pretrained(tmp_path / "base")
    layers = [f"transformer.h.{i}.mlp.{name}" for i in range(2) for name in ("c_fc", "c_proj")]
    own = adapter(tmp_path / "a", base, layers, 4, 0, lora_alpha=2, fan_in_fan_out=True)
    stored = merged(tmp_path, ["base+a"])
    for layer in layers:
        a, b = own[layer]
        down, up = kept(stored, layer, "down", "up")
        assert torch.equal(down, 0.5 * b.T)
        assert torch.equal(up, a)
    model = load_model(tmp_path / "out")
    route(model, torch.ones(1))
    assert same(model, with_change(base, own, 0.5))
    assert command("verify", tmp_path / "out")[0] == 0


def best(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def test_an_adapter_of_another_base_goes_the_dense_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task vector is the bases' difference too, which no factors hold."""
    found, base = dense_changes_read(monkeypatch), base_model(tmp_path)
    other = fine_tuned(base, 1)
    other.save_pretrained(tmp_path / "other")
    own = [adapter(tmp_path / name, base, LAYERS, 2, seed) for seed, name in enumerate("ab")]
    stored = merged(tmp_path, ["other+a", "base+b"])
    assert set(found) == {f"{layer}.weight" for layer in LAYERS}
    for layer in LAYERS:
        assert ranks_of(tmp_path)[layer] == [8, 2]
        a, b = own[0][layer]
        vector = (other.get_submodule(layer).weight - base.get_submodule(layer).weight).detach() + 2 * b @ a
        down, up, norms = kept(stored, layer, "down", "up", "norms")
        torch.testing.assert_close((up[:8].T @ down[:8]).double(), best(vector, 8), rtol=1e-4, atol=1e-5)
        assert torch.equal(down[8:], own[1][layer][0])
        dropped = (vector.double() - best(vector, 8)).norm()
        assert norms[0].tolist() == pytest.approx([float(vector.norm()), float(dropped)], rel=1e-4)


@pytest.mark.parametrize(("own_rank", "rank"), [(12, 5), (20, 16), (40, 3)])
def test_a_higher_rank_is_cut_as_the_dense_change_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_rank: int, rank: int
) -> None:
    """Also where the adapter has more ranks than the matrix has rows."""
    found, base = dense_changes_read(monkeypatch), base_model(tmp_path)
    own = adapter(tmp_path / "a", base, LAYERS, own_rank, 0, lora_alpha=own_rank)
    stored = merged(tmp_path, ["base+a"], f"{{form: low_rank, rank: {rank}}}")
    assert found == []
    for layer in LAYERS:
        a, b = own[layer]
        change = (b @ a).double()
        down, up, norms = kept(stored, layer, "down", "up", "norms")
        assert down.shape == (rank, a.shape[1])
        torch.testing.assert_close((up.T @ down).double(), best(change, rank), rtol=1e-4, atol=1e-4)
        dropped = (change - (up.T @ down).double()).norm()
        assert norms[0].tolist() == pytest.approx([float(change.norm()), float(dropped)], rel=1e-5, abs=1e-4)


def test_what_is_dropped_is_exact_where_it_is_little(tmp_path: Path) -> None:
    """A difference of two float32 norms would be off by up to 3e-4 of the whole."""
    base = base_model(tmp_path)
    own = adapter(tmp_path / "a", base, LAYERS, 4, 0)
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name, factor in state.items():
        if ".lora_A." in name:
            factor[3] *= 1e-4
    save_state(state, tmp_path / "a" / "adapter_model.safetensors")
    stored = merged(tmp_path, ["base+a"], "{form: low_rank, rank: 3}")
    for layer in LAYERS:
        a, b = own[layer][0].clone(), own[layer][1]
        a[3] *= 1e-4
        values = torch.linalg.svdvals((b @ a).double())
        (norms,) = kept(stored, layer, "norms")
        assert float(values[3]) < 3e-4 * float(values.norm())
        assert float(norms[0, 1]) == pytest.approx(float(values[3]), rel=0.02)


def test_an_expert_that_did_not_move_a_module_takes_no_room(tmp_path: Path, command: Command) -> None:
    base = base_model(tmp_path)
    adapter(tmp_path / "still", base, ["model.layers.0.self_attn.q_proj"], 4, 0)
    adapter(tmp_path / "too", base, ["lm_head"], 4, 0)
    own = adapter(tmp_path / "moved", base, LAYERS[:4], 4, 1)
    stored = merged(tmp_path, ["base+still", "base+moved", "base+too"])
    for layer in LAYERS:
        down, norms = kept(stored, layer, "down", "norms")
        if layer in own:
            assert ranks_of(tmp_path)[layer] == [0, 4, 0]
            assert torch.equal(down, own[layer][0])
            assert norms[[0, 2]].eq(0).all()
        else:  # nobody moved it: one rank of zeros stands for the layer
            assert ranks_of(tmp_path)[layer] == [1, 0, 0]
            assert kept(stored, layer, "up")[0].abs().max() == 0
    assert command("verify", tmp_path / "out")[0] == 0
    found = json.loads(command("inspect", tmp_path / "out", "--json")[1])["modules"]
    assert [module["error"] for module in found] == [0.0, 0.0]
    model = load_model(tmp_path / "out")
    route(model, torch.tensor([0.0, 1.0, 0.0]))
    expected = load_model(tmp_path / "out")
    route(expected, torch.tensor([7.0, 1.0, -7.0]))
    assert same(model, expected)


@pytest.mark.parametrize("mix", [{"still": 1.0}, {"moved": 1.0}, {"moved": -0.5, "whole": 0.8, "still": 3.0}])
def test_a_mix_of_ragged_ranks_is_exported(tmp_path: Path, command: Command, mix: dict[str, float]) -> None:
    base = base_model(tmp_path)
    adapter(tmp_path / "still", base, ["lm_head"], 4, 0)
    own = adapter(tmp_path / "moved", base, LAYERS, {"up_proj": 2, "": 4}, 1, rank_pattern={"up_proj": 2})
    whole = fine_tuned(base, 2)
    whole.save_pretrained(tmp_path / "whole")
    merged(tmp_path, ["base+still", "base+moved", "whole"], "{form: low_rank, energy: 0.95}")
    ranks = ranks_of(tmp_path)
    assert {still for still, _, _ in ranks.values()} == {0}
    assert len({r for own_ranks in ranks.values() for r in own_ranks}) > 3
    text = ",".join(f"{name}={value}" for name, value in mix.items())
    assert command("export", tmp_path / "out", tmp_path / "mixed", "--mix", text, "--quiet") == (0, "", "")
    model = load_model(tmp_path / "out")
    route(model, torch.tensor([mix.get(name, 0.0) for name in ("still", "moved", "whole")]))
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "mixed").eval()
    assert same(plain, model)
    down, up = kept(load_file(tmp_path / "out" / "wemoe.safetensors"), LAYERS[1], "down", "up")
    rank = ranks[LAYERS[1]][1]
    a, b = own[LAYERS[1]]
    scale = 4 / 2
    torch.testing.assert_close(up[:rank].T @ down[:rank], best(scale * b @ a, rank).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "task_vectors", ["{form: low_rank, energy: 0.8}", "{form: low_rank, max_parameters: 1.3x}"], ids=["energy", "limit"]
)
def test_open_ranks_of_adapters_need_no_dense_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task_vectors: str
) -> None:
    found, base = dense_changes_read(monkeypatch), base_model(tmp_path)
    own = adapter(tmp_path / "a", base, LAYERS, 6, 0)
    merged(tmp_path, ["base+a"], task_vectors)
    assert found == []
    ranks = {layer: r for layer, (r,) in ranks_of(tmp_path).items()}
    assert any(rank < 6 for rank in ranks.values())
    if "energy" in task_vectors:
        for layer, (a, b) in own.items():
            squares = torch.linalg.svdvals((b @ a).double()).square()
            assert squares[: ranks[layer]].sum() >= 0.8 * squares.sum() > squares[: ranks[layer] - 1].sum()


def test_bounds_of_adapters_are_their_ranks(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    adapter(tmp_path / "a", base, LAYERS, 6, 0)
    adapter(tmp_path / "b", base, LAYERS, 40, 0)
    (tmp_path / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: base+a}, {model: base+b}]\nmerge_method: task_arithmetic\n"
        "rules: [{match: mlp, merge_method: wemoe, parameters: {task_vectors: {form: low_rank, energy: 1.0}}}]\n"
    )
    source = load_recipe(tmp_path / "recipe.yaml")
    plan = plan_merge(source)
    assert {layer.sizes for module in plan.modules for layer in module.layers} == {(6, 16)}
    assert {layer.sizes for module in settle(source, plan).modules for layer in module.layers} == {(6, 16)}


def test_a_factor_that_is_not_finite_is_named(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    adapter(tmp_path / "a", base, LAYERS, 4, 0)
    path = tmp_path / "a" / "adapter_model.safetensors"
    state = load_file(path)
    name = f"base_model.model.{LAYERS[3]}.lora_B.weight"
    state[name][0, 0] = math.nan
    save_state(state, path)
    with pytest.raises(CheckpointError, match="holds NaN"):
        merged(tmp_path, ["base+a"])


@pytest.mark.parametrize("form", ["{form: sparse, density: 0.2}", "{}"])
def test_other_forms_hold_the_change_itself(tmp_path: Path, form: str) -> None:
    base = base_model(tmp_path)
    own = adapter(tmp_path / "a", base, LAYERS, 4, 0)
    stored = merged(tmp_path, ["base+a"], form)
    for layer in LAYERS:
        a, b = own[layer]
        change = (b @ a).flatten()
        if form == "{}":
            found = stored[f"{layer}.weight.task_vectors"][0].flatten()
        else:
            values, indices = kept(stored, layer, "values", "indices")
            found, count = torch.zeros_like(change).index_put((indices[0].long(),), values[0]), values.shape[1]
            change = torch.where(change.abs() >= change.abs().topk(count).values[-1], change, 0)
        torch.testing.assert_close(found, change, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_names_another_base_is_told(tmp_path: Path, command: Command) -> None:
    """It may be right, where a copy has another name; of another shape it would not fit."""
    base = base_model(tmp_path)
    for name, named in (("own", "./llama/base"), ("others", "someone/Llama-9"), ("silent", None)):
        adapter(tmp_path / name, base, LAYERS, 2, 0, base_model_name_or_path=named)
    merged(tmp_path, ["base+own", "base+others", "base+silent"])
    notes = json.loads(command("plan", tmp_path / "recipe.yaml", "--json")[1])["notes"]
    assert notes == [f"others: its adapter says that it was made for someone/Llama-9, not for {tmp_path / 'base'}"]


def test_a_fresh_merge_says_that_it_acts_as_the_static_one(tmp_path: Path, command: Command) -> None:
    base = base_model(tmp_path)
    adapter(tmp_path / "e", base, LAYERS, 2, 0)
    merged(tmp_path, ["base+e"])
    _, said, _ = command(tmp_path / "recipe.yaml", "--out", tmp_path / "again")
    assert "its routers are fresh: until they are tuned it acts as the static merge" in said
    assert "wemoe-merge tune" not in said
    status, _, err = command("tune", tmp_path / "again")
    assert (status, "train routers of others in a loop of your own" in err) == (2, True)
