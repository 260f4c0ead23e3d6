"""A plan is fixed from headers alone, and everything that does not fit is refused there."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import open_clip_family, save_open_clip, save_state, transformers_family

from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.merging.names import relative_depths
from wemoe_plugin.merging.operations import Combine, Copy, Upscale
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.recipe.loading import load_recipe

HEAD = """\
base_model: base
models: [{model: e0}, {model: e1, parameters: {weight: 0.5}}]
merge_method: task_arithmetic
parameters: {lambda: 0.3}
"""


def planned(directory: Path, rules: str = "", head: str = HEAD) -> MergePlan:
    path = directory / "recipe.yaml"
    path.write_text(head + rules)
    return plan_merge(load_recipe(path))


def refusal(directory: Path, rules: str = "", head: str = HEAD) -> str:
    with pytest.raises(PlanError) as caught:
        planned(directory, rules, head)
    return str(caught.value).replace(f"{directory}/", "")


def operation(plan: MergePlan, name: str) -> Copy | Combine | Upscale:
    return next(o for o in plan.operations if o.output.name == name)


def test_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weights file is read exactly to the end of its header."""
    open_clip_family(tmp_path)
    headers = {path: 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in tmp_path.glob("*/*.safetensors")}
    ends: dict[Path, int] = {}
    opened = Path.open

    class Noting(io.BufferedReader):
        def close(self) -> None:
            if not self.closed:
                ends[Path(str(self.name))] = self.tell()
            super().close()

    def noting(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".safetensors":
            return Noting(io.FileIO(path))
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", noting)
    for name in ("preadv", "pread", "read"):
        monkeypatch.setattr(f"os.{name}", None)
    assert planned(tmp_path, "rules: [{match: mlp, merge_method: wemoe}]").bytes_read > 0
    assert ends == headers


def test_the_first_rule_wins_and_the_default_takes_the_rest(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    rules = """\
rules:
  - {match: visual.transformer.resblocks.0, merge_method: base}
  - {match: visual.**.mlp, merge_method: wemoe}
  - {match: "**.ln_*", merge_method: linear}
"""
    plan = planned(tmp_path, rules)
    assert isinstance(operation(plan, "visual.transformer.resblocks.0.mlp.c_fc.weight"), Copy)
    assert isinstance(operation(plan, "visual.transformer.resblocks.1.mlp.c_fc.weight"), Upscale)
    linear = operation(plan, "visual.transformer.resblocks.1.ln_1.weight")
    assert isinstance(linear, Combine)
    assert (linear.mixture.base, linear.mixture.weights, linear.mixture.divisor) == (None, (1.0, 0.5), 1.5)
    rest = operation(plan, "visual.proj")
    assert isinstance(rest, Combine)
    assert rest.mixture.base is not None
    assert (rest.mixture.weights, rest.mixture.divisor, rest.mixture.scale) == ((1.0, 0.5), 1.0, 0.3)
    assert [module.path for module in plan.modules] == ["visual.transformer.resblocks.1.mlp"]
    assert [claim.label for claim in plan.claims] == [
        *("visual.transformer.resblocks.0", "visual.**.mlp", "**.ln_*"),
        "everything else",
    ]
    assert sum(claim.parameters for claim in plan.claims) == plan.base_parameters


def test_what_an_upscaled_module_stores(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    rule = (
        "rules: [{match: visual.**.mlp, merge_method: wemoe, parameters: {task_vectors: {form: low_rank, rank: 40}}}]"
    )
    plan = planned(tmp_path, rule)
    module = plan.modules[0]
    assert module.lambdas == (0.3, 0.15)
    assert (module.router.width, module.router.experts, module.router.depth) == (32, 2, 2)
    vectors = {name: shape for layer in module.layers for name, shape in layer.vectors}
    path = "visual.transformer.resblocks.0.mlp"
    assert vectors == {
        f"{path}.c_fc.weight.task_vectors.down": (64, 32),
        f"{path}.c_fc.weight.task_vectors.up": (64, 128),
        f"{path}.c_fc.weight.task_vectors.norms": (2, 2),
        f"{path}.c_fc.bias.task_vectors": (2, 128),
        f"{path}.c_proj.weight.task_vectors.down": (64, 128),
        f"{path}.c_proj.weight.task_vectors.up": (64, 32),
        f"{path}.c_proj.weight.task_vectors.norms": (2, 2),
        f"{path}.c_proj.bias.task_vectors": (2, 32),
    }
    assert module.router.parameters == 32 * 32 + 32 + 32 * 2 + 2


def test_towers_that_no_expert_has_are_the_base_and_experts_saved_alone_are_renamed(tmp_path: Path) -> None:
    transformers_family(tmp_path)
    plan = planned(tmp_path, "rules: [{match: mlp, merge_method: wemoe}]")
    assert all(name.startswith(("text_", "logit_scale", "visual_projection")) for name in plan.base_only)
    assert len(plan.base_only) == 39
    assert [module.path for module in plan.modules] == [f"vision_model.encoder.layers.{i}.mlp" for i in range(2)]
    assert refusal(tmp_path, "rules: [{match: text_model.**, merge_method: wemoe}]") == (
        "recipe.yaml:5: rules[0] matches only tensors that no expert has; they have no task vectors"
    )


def test_the_output_dtype_is_the_recipes_or_the_bases(tmp_path: Path) -> None:
    open_clip_family(tmp_path, dtype=torch.float16)
    assert {t.dtype for file in planned(tmp_path).files for t in file.tensors} == {"F16"}
    assert planned(tmp_path).dtype == "F32"
    plan = planned(tmp_path, "dtype: float64\nout_dtype: bfloat16\n")
    assert plan.dtype == "F64"
    assert {t.dtype for file in plan.files for t in file.tensors} == {"BF16"}
    assert {t.dtype for file in planned(tmp_path, "dtype: float32\n").files for t in file.tensors} == {"F32"}


def test_transformers_weights_are_sharded_and_open_clips_never(tmp_path: Path) -> None:
    transformers_family(tmp_path / "t")
    (tmp_path / "t" / "recipe.yaml").write_text(HEAD)
    plan = plan_merge(load_recipe(tmp_path / "t" / "recipe.yaml"), shard_bytes=50_000)
    assert plan.static_files[0].name == f"model-00001-of-{len(plan.static_files):05d}.safetensors"
    assert all(file.nbytes <= 50_000 or len(file.tensors) == 1 for file in plan.static_files)
    assert len(plan.static_files) > 1
    open_clip_family(tmp_path / "o")
    (tmp_path / "o" / "recipe.yaml").write_text(HEAD)
    files = plan_merge(load_recipe(tmp_path / "o" / "recipe.yaml"), shard_bytes=50_000).static_files
    assert [file.name for file in files] == ["open_clip_model.safetensors"]


def test_a_base_among_the_models_has_no_task_vector(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    plan = planned(tmp_path, head=HEAD.replace("[{model: e0}", "[{model: base}, {model: e0}"))
    assert [expert.name for expert in plan.experts] == ["e0", "e1"]
    rest = operation(plan, "visual.proj")
    assert isinstance(rest, Combine)
    assert rest.mixture.weights == (1.0, 0.5)


def test_gradients_follow_the_depth(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    plan = planned(tmp_path, head=HEAD.replace("weight: 0.5", "weight: [0.0, 1.0]"))
    weights = [
        operation(plan, f"visual.transformer.resblocks.{i}.ln_1.weight").mixture.weights[1]  # type: ignore[union-attr]
        for i in range(2)
    ]
    assert weights == [0.0, 1.0]
    assert relative_depths([f"h.{i}.w" for i in range(5)] + ["wte.weight", "norm.weight"]) == {
        **{f"h.{i}.w": i / 4 for i in range(5)},
        **{"wte.weight": 0.0, "norm.weight": 0.0},
    }


def edit(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file

    state = load_file(path)
    change(state)
    save_state(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"visual.proj": torch.zeros(32, 8)}),
            "e1 (e1): 'visual.proj' has shape [32, 8], the base [32, 16]",
        ),
        (lambda s: s.pop("visual.proj"), "e1 (e1): lacks 'visual.proj', which the base and other experts have"),
        (lambda s: s.update(extra=torch.zeros(1)), "e1 (e1): has 'extra', which the base base has not"),
        (
            lambda s: s.update({"visual.proj": torch.zeros(32, 16, dtype=torch.int32)}),
            "e1 (e1): 'visual.proj' is I32, in the base F32",
        ),
    ],
)
def test_an_expert_that_does_not_fit_is_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    open_clip_family(tmp_path)
    edit(tmp_path / "e1" / "open_clip_model.safetensors", change)
    assert refusal(tmp_path) == message


def test_another_activation_is_refused(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    config = tmp_path / "e0" / "open_clip_config.json"
    config.write_text(config.read_text().replace('"model_cfg": {', '"model_cfg": {"quick_gelu": true, '))
    assert (
        refusal(tmp_path) == "e0 (e0): its activation is QuickGELU, the base's GELU; merged weights would fit neither"
    )


def test_another_model_altogether_is_refused(tmp_path: Path) -> None:
    models = open_clip_family(tmp_path, 1)
    other = save_open_clip(models[0], tmp_path / "e1")
    save_state({"w": torch.zeros(1)}, other / "open_clip_model.safetensors")
    assert "none of its tensors is in the base base; is it a fine-tune of it?" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "{match: visual.transformer.blocks.*.mlp, merge_method: base}",
            "recipe.yaml:5: rules[0].match 'visual.transformer.blocks.*.mlp' matches no tensor of base\n"
            "    nearest: visual.transformer.resblocks.*.mlp",
        ),
        (
            "{match: visual.**, merge_method: base}, {match: visual.proj, merge_method: linear}",
            "recipe.yaml:5: rules[1].match 'visual.proj' matches only what earlier rules claim",
        ),
        (
            "{match: visual.ln_pre, merge_method: wemoe}",
            "recipe.yaml:5: rules[0]: the module visual.ln_pre has no Linear layers",
        ),
        (
            "{match: visual.conv1, merge_method: wemoe}",
            "recipe.yaml:5: rules[0]: the module visual.conv1 has no Linear layers",
        ),
        (
            "{match: token_embedding, merge_method: wemoe}",
            "recipe.yaml:5: rules[0]: the module token_embedding has no Linear layers",
        ),
        (
            "{match: visual.transformer.resblocks.0.attn, merge_method: wemoe}",
            "recipe.yaml:5: rules[0]: visual.transformer.resblocks.0.attn.in_proj_weight belongs to an "
            "nn.MultiheadAttention, which fuses its weights and calls no Linear layer; leave it to a static method",
        ),
        (
            "{match: [visual.**.mlp, transformer.**.mlp], merge_method: wemoe, parameters: {router: {shared: true}}}",
            "recipe.yaml:5: rules[0]: one shared router cannot read modules of different widths (16, 32)",
        ),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(tmp_path: Path, rule: str, message: str) -> None:
    open_clip_family(tmp_path)
    assert refusal(tmp_path, f"rules: [{rule}]").startswith(message)


SHARED = "{match: visual.**.mlp, merge_method: wemoe, parameters: {router: {shared: true}}}"


@pytest.mark.parametrize(
    ("head", "rules", "message"),
    [
        (
            HEAD.replace("lambda: 0.3", "lambda: [0.1, 0.9]"),
            SHARED,
            "one shared router starts at one λ for all its modules",
        ),
        (
            HEAD.replace("weight: 0.5", "weight: [{filter: c_proj, value: 0.0}, {value: 1.0}]"),
            "{match: visual.**.mlp, merge_method: wemoe}",
            "a module has one λ per expert",
        ),
        (
            HEAD,
            "{match: visual.**.c_fc, merge_method: wemoe}, {match: visual.**.mlp, merge_method: wemoe}",
            "visual.transformer.resblocks.0.mlp.c_fc lies inside another upscaled module",
        ),
        (HEAD, "{match: visual.**.attn.out_proj, merge_method: wemoe}", "belongs to an nn.MultiheadAttention"),
        (HEAD, "{match: logit_scale, merge_method: wemoe}", "logit_scale is not the weight of a Linear layer"),
        (HEAD, "{match: visual.proj, merge_method: wemoe}", "visual.proj is not the weight of a Linear layer"),
        (
            "base_model: base\nmodels: [{model: base}]\nmerge_method: task_arithmetic\n",
            "{match: visual.**.mlp, merge_method: wemoe}",
            "every model is the base; wemoe needs an expert",
        ),
    ],
)
def test_mixtures_that_could_not_work_are_refused(tmp_path: Path, head: str, rules: str, message: str) -> None:
    open_clip_family(tmp_path)
    assert message in refusal(tmp_path, f"rules: [{rules}]", head)


def test_the_routers_width_is_that_of_the_whole_module(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    rules = "{match: visual.**.c_fc, merge_method: base}, {match: visual.**.mlp, merge_method: wemoe}"
    assert {module.router.width for module in planned(tmp_path, f"rules: [{rules}]").modules} == {32}


def test_normalize_counts_for_mixtures_too(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    head = HEAD.replace("lambda: 0.3", "lambda: 0.3, normalize: true")
    plan = planned(tmp_path, "rules: [{match: visual.**.mlp, merge_method: wemoe}]", head)
    assert plan.modules[0].lambdas == pytest.approx((0.3 / 1.5, 0.15 / 1.5))


def test_linear_without_a_base_merges_all_its_models(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    plan = planned(tmp_path, head="models: [{model: base}, {model: e0}]\nmerge_method: linear\n")
    assert [expert.name for expert in plan.experts] == ["base", "e0"]
    proj = operation(plan, "visual.proj")
    assert isinstance(proj, Combine)
    assert len(proj.mixture.inputs) == 2


def test_another_activation_of_a_transformers_tower_is_refused(tmp_path: Path) -> None:
    transformers_family(tmp_path)
    config = json.loads((tmp_path / "e0" / "config.json").read_text())
    (tmp_path / "e0" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert refusal(tmp_path) == (
        "e0 (e0): its activation of vision_config is relu, the base's quick_gelu; merged weights would fit neither"
    )


def test_a_model_without_tensors_is_refused(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    save_state({}, tmp_path / "e0" / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        planned(tmp_path)


def test_the_nearest_module_is_the_one_with_the_same_last_name(tmp_path: Path) -> None:
    transformers_family(tmp_path)
    message = refusal(tmp_path, "rules: [{match: visual.**.mlp, merge_method: wemoe}]")
    assert message.endswith("\n    nearest: vision_model.encoder.layers.*.mlp")


def test_keywords_that_find_nothing_say_why(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    for name in ("base", "e0", "e1"):
        save_state({"x.weight": torch.zeros(2, 2)}, tmp_path / name / "open_clip_model.safetensors")
    assert "no module holds just the layers of a known family" in refusal(
        tmp_path, "rules: [{match: mlp, merge_method: wemoe}]"
    )


def test_weights_that_cancel_cannot_be_normalized(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    head = (
        HEAD.replace("task_arithmetic", "linear").replace("weight: 0.5", "weight: -1").replace("parameters: {l", "# {l")
    )
    assert "the weights of the models add up to 0" in refusal(tmp_path, head=head)
