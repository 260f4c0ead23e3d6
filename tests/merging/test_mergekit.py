"""A mergekit recipe gives here what it gives with mergekit, tensor for tensor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.merge_methods import ParameterScope, TensorGroup, registered_methods
from models import fine_tuned, save_state
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.executor import execute_plan
from wemoe_plugin.merging.mergekit_bridge import merge_tensors, register_methods
from wemoe_plugin.merging.operations import Delegate, OutputTensor
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.merging.spectral import isotropic_merge
from wemoe_plugin.recipe.loading import load_recipe
from wemoe_plugin.recipe.methods import METHODS

LLAMA = LlamaConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
THREE = ["e0", "e1", "e2"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LLAMA)
    for name, model in [("base", base), *((f"e{k}", fine_tuned(base, k)) for k in range(3))]:
        model.save_pretrained(directory / name)
    return directory


def recipe(directory: Path, method: str, models: list[str], base: bool, parameters: Any, own: Any) -> dict[str, Any]:
    entries = [{"model": str(directory / name), "parameters": own[i] if own else {}} for i, name in enumerate(models)]
    return {
        "merge_method": method,
        "models": entries,
        "dtype": "float32",
        "parameters": parameters,
        **({"base_model": str(directory / "base")} if base else {}),
    }


def ours(content: dict[str, Any], directory: Path) -> dict[str, Tensor]:
    directory.mkdir()
    (directory / "recipe.yaml").write_text(yaml.safe_dump(content))
    execute_plan(plan_merge(load_recipe(directory / "recipe.yaml")), directory, jobs=2, chunk_elements=300)
    return load_file(directory / "model.safetensors")


def mergekits(content: dict[str, Any], directory: Path) -> dict[str, Tensor]:
    register_methods()
    run_merge(
        MergeConfiguration.model_validate(content), str(directory), MergeOptions(quiet=True, copy_tokenizer=False)
    )
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


WEIGHTS: list[Any] = [
    {"weight": 0.7},
    {"weight": [0.1, 0.9]},
    {"weight": [{"filter": "mlp", "value": 0.2}, {"value": 1.5}]},
]
CASES: dict[str, tuple[str, list[str], bool, Any, Any]] = {
    "task arithmetic": ("task_arithmetic", THREE, True, {"lambda": [0.2, 0.6]}, WEIGHTS),
    "task arithmetic, normalized": ("task_arithmetic", THREE, True, {"lambda": 0.5, "normalize": True}, WEIGHTS),
    "ties": ("ties", THREE, True, {"density": 0.4, "lambda": 0.7}, WEIGHTS),
    "ties, flags": ("ties", THREE, True, {"density": [0.2, 0.8], "normalize": False, "int8_mask": True}, WEIGHTS),
    "ties, a flag by depth": ("ties", THREE, True, {"density": 0.5, "rescale": [True, False]}, WEIGHTS),
    "breadcrumbs": ("breadcrumbs", THREE, True, {"density": 0.6, "gamma": 0.1}, WEIGHTS),
    "breadcrumbs with ties": ("breadcrumbs_ties", THREE, True, {"density": 0.6, "gamma": 0.1}, WEIGHTS),
    "dare keeping everything": ("dare_ties", THREE, True, {"density": 1.0}, WEIGHTS),
    "sce": ("sce", THREE, True, {"select_topk": 0.3}, None),
    "ram": ("ram", THREE, True, {"epsilon": 0.01}, None),
    "ram plus": ("ramplus_tl", THREE, True, {"r": 0.2, "epsilon": 0.01}, None),
    "model stock": ("model_stock", THREE, True, {}, None),
    "model stock, by rows": ("model_stock", THREE, True, {"filter_wise": True}, None),
    "arcee fusion of small tensors": ("arcee_fusion", ["e0"], True, {}, None),
    "slerp": ("slerp", ["e0"], True, {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.3}]}, None),
    "slerp, base listed first": ("slerp", ["base", "e1"], True, {"t": 0.3}, None),
    "nearswap": ("nearswap", ["e0"], True, {"t": 0.02}, None),
    "nuslerp": ("nuslerp", ["e0", "e1"], False, {"nuslerp_flatten": False}, WEIGHTS[:2]),
    "nuslerp of task vectors": ("nuslerp", ["e0", "e1"], True, {"nuslerp_row_wise": True}, WEIGHTS[:2]),
    "multislerp": ("multislerp", THREE, False, {}, WEIGHTS),
    "multislerp of task vectors": ("multislerp", THREE, True, {"eps": 1e-6}, WEIGHTS),
    "karcher": ("karcher", THREE, False, {"max_iter": 4}, None),
    "karcher, the base among them": ("karcher", THREE, True, {}, None),
    "passthrough": ("passthrough", ["e1"], False, {"scale": [{"filter": "o_proj", "value": 0}, {"value": 2}]}, None),
    "isotropic": ("iso_c", THREE, True, {"lambda": 0.8}, WEIGHTS),
    "task singular vectors": ("tsv_m", THREE, True, {"lambda": 0.8}, WEIGHTS),
}


LAST_BIT = {
    "task arithmetic, normalized": "the sum of the weights is rounded once here, after every addition there",
    "isotropic": "decompositions round differently where a tensor lies differently in memory",
    "task singular vectors": "decompositions round differently where a tensor lies differently in memory",
}


@pytest.mark.parametrize("case", CASES)
def test_deterministic_methods_give_mergekits_tensors(family: Path, tmp_path: Path, case: str) -> None:
    """Gradients, filters and values of each model included; bit by bit, but where a reason is given."""
    content = recipe(family, *CASES[case])
    theirs = mergekits(content, tmp_path / "theirs")
    found = ours(content, tmp_path / "ours")
    assert found.keys() == theirs.keys()
    if case in LAST_BIT:
        rtol = 3e-7 if "normalized" in case else 2e-5
        torch.testing.assert_close(found, theirs, rtol=rtol, atol=rtol / 10)
    else:
        assert [name for name in theirs if not torch.equal(found[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_whole_tensors_are_merged_in_the_recipes_dtype_and_ranges_more_exactly(
    family: Path, tmp_path: Path, dtype: str
) -> None:
    content = recipe(family, "ties", THREE, True, {"density": 0.5}, WEIGHTS) | {"dtype": dtype}
    theirs, found = mergekits(content, tmp_path / "theirs"), ours(content, tmp_path / "ours")
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)
    exact = ours(recipe(family, "task_arithmetic", THREE, True, {}, WEIGHTS) | {"dtype": "float64"}, tmp_path / "exact")
    content = recipe(family, "task_arithmetic", THREE, True, {}, WEIGHTS) | {"dtype": dtype}
    theirs, found = mergekits(content, tmp_path / "theirs2"), ours(content, tmp_path / "ours2")
    assert all(found[name].dtype == theirs[name].dtype == getattr(torch, dtype) for name in exact)
    nearest = sum(float((t.to(getattr(torch, dtype)).double() - t).square().sum()) for t in exact.values())
    mine, other = (
        sum(float((state[name].double() - t).square().sum()) for name, t in exact.items()) for state in (found, theirs)
    )
    assert mine <= 1.001 * nearest  # what one rounding costs
    assert other > 1.5 * nearest


SMALL = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES = {
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=3, n_head=2, n_positions=16)),
    "Qwen 3, tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, **HEADS, tie_word_embeddings=True)),
    "RoBERTa": lambda: RobertaForSequenceClassification(
        RobertaConfig(**SMALL, num_attention_heads=2, max_position_embeddings=16)
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_depth_is_counted_as_mergekit_counts_it(tmp_path: Path, architecture: str) -> None:
    """Layers have other names in every architecture, and so do the tensors before and after them."""
    torch.manual_seed(0)
    base = ARCHITECTURES[architecture]()
    for name, model in [("base", base), *((f"e{k}", fine_tuned(base, k)) for k in range(3))]:
        model.save_pretrained(tmp_path / name)
    content = recipe(tmp_path, "task_arithmetic", THREE, True, {"lambda": [0.2, 0.7, 0.3]}, WEIGHTS)
    theirs, found = mergekits(content, tmp_path / "theirs"), ours(content, tmp_path / "ours")
    assert found.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(found[name], theirs[name])] == []


def test_the_base_is_averaged_in_where_mergekit_does(family: Path, tmp_path: Path) -> None:
    content = recipe(family, "linear", THREE, True, {"weight": 0.5}, None)
    theirs, found = mergekits(content, tmp_path / "theirs"), ours(content, tmp_path / "ours")
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-7)  # mergekit fuses products and sums
    (note,) = plan_merge(load_recipe(tmp_path / "ours" / "recipe.yaml")).notes
    assert "the base is averaged in as well" in note


def test_an_expert_that_is_named_base_lends_its_weight_to_nobody(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "e0", tmp_path / "base")
    content = recipe(family, "linear", THREE, True, {"weight": 0.5}, None)
    content["models"][0] = {"model": str(tmp_path / "base"), "parameters": {"weight": 0.9}}
    theirs, found = mergekits(content, tmp_path / "theirs"), ours(content, tmp_path / "ours")
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decompositions_of_half_precision_are_taken_in_float32(
    family: Path, tmp_path: Path, method: str, dtype: str
) -> None:
    exact = ours(recipe(family, method, THREE, True, {}, None), tmp_path / "exact")
    found = ours(recipe(family, method, THREE, True, {}, None) | {"dtype": dtype}, tmp_path / "half")
    for name, values in exact.items():
        assert found[name].dtype == getattr(torch, dtype)
        torch.testing.assert_close(found[name].float(), values, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("base", "passthrough")])
def test_every_method_takes_scalars(tmp_path: Path, method: str) -> None:
    """CLIP keeps its temperature in one. DELLA ranks the elements of a row, which fails for one, and says so."""
    for k, name in enumerate(["base", "e0", "e1"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_state({"scale": torch.tensor(2.0 + k)}, tmp_path / name / "model.safetensors")
    two = METHODS[method].inputs[1] == 2
    content = recipe(tmp_path, method, ["e0"] if two else ["e0", "e1"], METHODS[method].base != "ignored", {}, None)
    content["parameters"] = {"t": 0.5} if two else {"density": 0.5, "weight": 0.5}
    if method.startswith("della"):
        with pytest.raises(PlanError, match="'scale' cannot be merged by della"):
            ours(content, tmp_path / "out")
        return
    merged = ours(content, tmp_path / "out")["scale"]
    assert merged.shape == ()
    assert 0 < float(merged) < 7


def test_what_a_kernel_refuses_is_told_with_its_tensor(family: Path, tmp_path: Path) -> None:
    content = recipe(family, "della", THREE, True, {"density": 0.9}, None)
    with pytest.raises(PlanError, match=r"'.*' cannot be merged by della: Epsilon must be chosen"):
        ours(content, tmp_path / "ours")


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.random])
def test_random_methods_draw_from_a_seed_of_each_tensor(family: Path, tmp_path: Path, method: str) -> None:
    """mergekit draws for one tensor after the other; here the order of threads must not matter."""
    models, parameters = (["e0"], {}) if method == "arcee_fusion" else (THREE, {"density": 0.5})
    content = recipe(family, method, models, True, parameters, None)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    source = load_recipe(tmp_path / "recipe.yaml")
    files = []
    for i, (seed, jobs) in enumerate([(1, 1), (1, 4), (2, 1)]):
        (tmp_path / f"{i}").mkdir()
        execute_plan(plan_merge(source, seed=seed), tmp_path / f"{i}", jobs=jobs)
        files.append((tmp_path / f"{i}" / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert (files[0] == files[2]) == (method == "arcee_fusion")  # it draws for tensors of more than a million only

    operation = next(o for o in plan_merge(source, seed=1).operations if o.output.name.endswith("q_proj.weight"))
    assert isinstance(operation, Delegate)
    assert operation.seed is not None
    states = [load_file(family / name / "model.safetensors")[operation.output.name] for name in [*models, "base"]]
    group = TensorGroup.from_tensors(states, base_index=len(models))
    torch.manual_seed(operation.seed)
    (expected,) = merge_methods.get(method)(
        [group], parameters=parameters | ({} if models == ["e0"] else {"weight": 1})
    )
    merged = load_file(tmp_path / "0" / "model.safetensors")[operation.output.name]
    assert torch.equal(merged, expected)


def test_arcee_fusion_samples_large_tensors_from_its_seed() -> None:
    tensors = [torch.randn(1001, 1000, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    operation = Delegate(OutputTensor("w", "F32", (1001, 1000)), "arcee_fusion", "F32", (), 1, {}, ({}, {}), 7)
    torch.manual_seed(7)
    (expected,) = merge_methods.get("arcee_fusion")([TensorGroup.from_tensors(tensors, base_index=1)])
    assert torch.equal(merge_tensors(operation, tensors), expected)


def test_drawing_leaves_the_callers_generator_alone(family: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ours(recipe(family, "dare_ties", THREE, True, {"density": 0.5}, None), tmp_path / "ours")
    assert torch.equal(torch.rand(3), expected)


KINDS = {"number": float, "integer": int, "flag": bool}


def test_the_table_of_methods_is_mergekits() -> None:
    """Names, parameters, kinds, scopes, defaults and numbers of models; a weight may be left out here, and is 1."""
    register_methods()
    registry = {method.spec.name: method.spec for method in registered_methods()}
    assert set(registry) | {"base"} == set(METHODS)
    for name, spec in registry.items():
        method = METHODS[name]
        assert {p.name for p in spec.parameters} == {*method.parameters, *method.idle}
        assert spec.contract.base.value == method.base
        assert (spec.contract.min_inputs, spec.contract.max_inputs) == method.inputs
        assert (spec.contract.min_non_base or 0, spec.contract.max_non_base) == method.others
        assert spec.reference_url == (method.source or None)
        for theirs in spec.parameters:
            mine = method.parameters.get(theirs.name)
            if mine is None:
                continue
            assert theirs.value_type in (KINDS[mine.kind], KINDS[mine.kind] | None)
            assert (theirs.scope == ParameterScope.SHARED) == (mine.scope == "all")
            if theirs.name == "weight":
                assert mine.default == 1.0
            else:
                assert (theirs.required, None if theirs.required else theirs.default) == (mine.required, mine.default)


def test_our_methods_take_their_name_in_mergekit_once() -> None:
    register_methods()
    register_methods()
    assert [m.spec.name for m in registered_methods()].count("iso_c") == 1


@pytest.mark.parametrize(
    ("method", "models", "base", "parameters", "message"),
    [
        ("slerp", THREE, True, {"t": 0.5}, "slerp takes 2 models, the base among them; there are 4"),
        ("model_stock", ["e0"], True, {}, "model_stock takes at least 3 models, the base among them; there are 2"),
        ("nuslerp", THREE, False, {}, "nuslerp takes 2 models beside the base; there are 3"),
        ("slerp", ["e0"], True, {}, "slerp needs the parameter t, which the recipe does not give for lm_head"),
    ],
)
def test_what_a_method_cannot_take_is_refused_in_the_plan(
    family: Path, tmp_path: Path, method: str, models: list[str], base: bool, parameters: Any, message: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(family, method, models, base, parameters, None)))
    with pytest.raises(PlanError, match=message):
        plan_merge(load_recipe(tmp_path / "recipe.yaml"))


def test_methods_in_rules_beside_ours(family: Path, tmp_path: Path) -> None:
    """Each part by its own method, under modules that are upscaled."""
    content = recipe(family, "ties", THREE, True, {"density": 0.5, "weight": 0.5, "lambda": 0.4}, None)
    content["rules"] = [
        {"match": "**.self_attn", "merge_method": "dare_ties", "parameters": {"density": [0.9, 0.7], "weight": 0.3}},
        {"match": "**.mlp", "merge_method": "wemoe"},
        {"match": "lm_head", "merge_method": "iso_c", "parameters": {"lambda": 1.0}},
    ]
    merged = ours(content, tmp_path / "ours")
    states = [load_file(family / name / "model.safetensors") for name in ["base", *THREE]]
    name = "model.layers.1.mlp.up_proj.weight"
    base = states[0][name].double()
    static = base + 0.4 * 0.5 * sum(state[name].double() - base for state in states[1:])
    torch.testing.assert_close(merged[name].double(), static, rtol=1e-6, atol=1e-7)
    vectors = torch.stack([0.5 * (state["lm_head.weight"] - states[0]["lm_head.weight"]) for state in states[1:]])
    expected = states[0]["lm_head.weight"] + isotropic_merge(vectors)
    torch.testing.assert_close(merged["lm_head.weight"], expected, rtol=1e-4, atol=1e-5)
    plan = plan_merge(load_recipe(tmp_path / "ours" / "recipe.yaml"))
    drawn = {o.output.name: o for o in plan.operations if isinstance(o, Delegate) and o.method == "dare_ties"}
    assert {dict(o.per_input[0])["density"] for o in drawn.values()} == {0.9, 0.8, 0.7}
    assert {dict(o.per_input[0])["weight"] for o in drawn.values()} == {0.3}
