"""Sparse task vectors, and what every form says about itself: what is kept, what is lost, what it takes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import open_clip_family, save_open_clip
from safetensors.torch import load_file
from torch import Tensor, nn

from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.executor import execute_plan
from wemoe_plugin.merging.memory import CHUNK_ELEMENTS, operation_memory, piece_memory
from wemoe_plugin.merging.operations import Compress
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.merging.survey import losses, settle
from wemoe_plugin.modeling.loading import load_model
from wemoe_plugin.modeling.wemoe import wemoe_modules
from wemoe_plugin.pipeline.merge import merge
from wemoe_plugin.recipe.loading import load_recipe

Command = Callable[..., tuple[int, str, str]]
WEIGHTS = "open_clip_model.safetensors"
SPARSE = "{form: sparse, density: 0.1}"
FORMS = {
    "dense": "{}",
    "rank": "{form: low_rank, rank: 3}",
    "full rank": "{form: low_rank, rank: 99}",
    "energy": "{form: low_rank, energy: 0.7}",
    "limit": "{form: low_rank, max_parameters: 1.4x}",
    "sparse": SPARSE,
    "all entries": "{form: sparse, density: 1}",
}


def merged(directory: Path, form: str, rest: str = "", out: str = "out") -> dict[str, Tensor]:
    """Merge with this form for the vision tower's MLPs; returns all the tensors that are written."""
    (directory / "recipe.yaml").write_text(
        f"base_model: base\nmodels: [{{model: e0}}, {{model: e1}}]\nmerge_method: task_arithmetic\n{rest}"
        "parameters: {lambda: 0.3}\nrules:\n"
        "  - match: visual.**.mlp\n    merge_method: wemoe\n"
        f"    parameters: {{router: {{depth: 0}}, task_vectors: {form}}}\n"
    )
    source = load_recipe(directory / "recipe.yaml")
    merge(source, plan_merge(source), directory / out)
    return load_file(directory / out / WEIGHTS) | load_file(directory / out / "wemoe.safetensors")


def vectors(directory: Path) -> dict[str, list[Tensor]]:
    """The task vectors of the vision tower's MLPs, float32, from the experts' files."""
    base, *experts = (load_file(directory / name / WEIGHTS) for name in ("base", "e0", "e1"))
    return {
        name: [(state[name].float() - weight.float()) for state in experts]
        for name, weight in base.items()
        if name.startswith("visual.") and ".mlp." in name and name.endswith(".weight")
    }


def stored_vectors(stored: dict[str, Tensor], directory: Path, name: str, shape: torch.Size) -> list[Tensor]:
    """What is kept of each expert's task vector, dense again; from the files alone."""
    key = f"{name}.task_vectors"
    if key in stored:
        return list(stored[key])
    if f"{key}.values" in stored:
        pairs = zip(stored[f"{key}.values"], stored[f"{key}.indices"].long(), strict=True)
        return [torch.zeros(shape.numel(), dtype=v.dtype).scatter(0, i, v).view(shape) for v, i in pairs]
    config = json.loads((directory / "wemoe_config.json").read_text())
    (ranks,) = (
        layer["ranks"]
        for module in config["modules"]
        for layer in module["layers"]
        if f"{module['path']}.{layer['path']}.weight" == name
    )
    downs, ups = stored[f"{key}.down"].split(ranks), stored[f"{key}.up"].split(ranks)
    return [up.T @ down for down, up in zip(downs, ups, strict=True)]


def test_the_largest_entries_are_kept(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    stored = merged(tmp_path, SPARSE)
    for name, own in vectors(tmp_path).items():
        values, indices = (stored[f"{name}.task_vectors.{part}"] for part in ("values", "indices"))
        count = round(0.1 * own[0].numel())
        assert (values.shape, values.dtype, indices.dtype) == ((2, count), torch.float32, torch.int32)
        for k, vector in enumerate(own):
            flat = vector.flatten()
            expected = sorted(range(len(flat)), key=lambda i: -abs(float(flat[i])))[:count]
            assert indices[k].tolist() == sorted(expected)
            assert torch.equal(values[k], flat[indices[k].long()])


@pytest.mark.parametrize(("density", "count"), [("1e-9", 1), ("0.0001", 1), ("0.00037", 2), ("0.5", 2048)])
def test_a_density_is_a_number_of_entries_and_one_at_least(tmp_path: Path, density: str, count: int) -> None:
    open_clip_family(tmp_path)
    stored = merged(tmp_path, f"{{form: sparse, density: {density}}}")
    assert {t.shape[1] for name, t in stored.items() if name.endswith(".values")} == {count}


def test_all_entries_are_the_dense_form_exactly(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    dense, sparse = merged(tmp_path, "{}", out="dense"), merged(tmp_path, FORMS["all entries"], out="sparse")
    for name, own in vectors(tmp_path).items():
        assert torch.equal(stored_vectors(sparse, tmp_path / "sparse", name, own[0].shape)[1], own[1])
        assert torch.equal(dense[f"{name}.task_vectors"], torch.stack(own))
        assert torch.equal(dense[name], sparse[name])
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs = [routed(tmp_path / out, [0.9, -0.4]).encode_image(images) for out in ("dense", "sparse")]
    assert torch.equal(*outputs)


def routed(directory: Path, weights: list[float]) -> Any:
    model = load_model(directory)
    with torch.no_grad():
        for _, module in wemoe_modules(model):
            (bias,) = module.router.parameters()  # of depth 0
            bias.copy_(torch.tensor(weights))
    return model


@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_composed_of_what_is_stored(tmp_path: Path, form: str) -> None:
    """θ_static + Σₖ (wₖ − λ) τₖ for every weight and bias, by hand."""
    model: nn.Module = open_clip_family(tmp_path)[0]
    stored = merged(tmp_path, FORMS[form])
    state = {name: tensor.clone() for name, tensor in stored.items() if ".task_vectors" not in name}
    for name, tensor in state.items():
        if name.startswith("visual.") and ".mlp." in name:
            kept = stored_vectors(stored, tmp_path / "out", name, tensor.shape)
            tensor.add_(sum((w - 0.3) * vector for w, vector in zip([0.9, -0.4], kept, strict=True)))
    plain = copy.deepcopy(model)
    plain.load_state_dict(state)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = routed(tmp_path / "out", [0.9, -0.4]).encode_image(images)
    torch.testing.assert_close(found, plain.encode_image(images), rtol=0, atol=1e-5)  # type: ignore[operator]


def test_sparse_files_are_smaller_than_dense_ones(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    weights = 4 * 4096 * 2  # four matrices, two experts
    sizes = {}
    for form in ("dense", "sparse", "rank"):
        merged(tmp_path, FORMS[form], out=form)
        sizes[form] = (tmp_path / form / "wemoe.safetensors").stat().st_size
    assert sizes["dense"] > 4 * weights
    assert sizes["sparse"] < 0.1 * 8 * weights + 6000  # values and indices; beside it biases, norms and the header
    assert sizes["rank"] < 3 * 8 * 160 * 4 + 6000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["sparse", "rank", "energy"])
def test_half_precision_is_chosen_in_float32_and_rounded_once(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    open_clip_family(tmp_path, dtype=torch.float16)
    out_dtype = f"out_dtype: {str(dtype).removeprefix('torch.')}\n"
    exact = merged(tmp_path, FORMS[form], "out_dtype: float32\n", out="exact")
    found = merged(tmp_path, FORMS[form], out_dtype, out="half")
    names = [name for name in exact if ".task_vectors." in name]
    assert len(names) == 12
    for name in names:
        kind = torch.int32 if name.endswith(".indices") else torch.float32 if name.endswith(".norms") else dtype
        assert found[name].dtype == kind
        assert torch.equal(found[name], exact[name].to(kind))
    assert all(torch.isfinite(p).all() for p in load_model(tmp_path / "half").state_dict().values())


@pytest.mark.parametrize("form", FORMS)
def test_norms_are_those_of_the_task_vectors_and_of_what_is_lost(tmp_path: Path, command: Command, form: str) -> None:
    """By hand from the files; and the plan that measures, ``inspect`` and the files agree."""
    open_clip_family(tmp_path)
    stored = merged(tmp_path, FORMS[form])
    whole: dict[str, list[float]] = {}
    lost: dict[str, list[float]] = {}
    for name, own in vectors(tmp_path).items():
        kept = stored_vectors(stored, tmp_path / "out", name, own[0].shape)
        path = name[: name.index(".mlp.") + 4]
        for k, (vector, part) in enumerate(zip(own, kept, strict=True)):
            norm, dropped = float(vector.double().norm()), float((vector.double() - part.double()).norm())
            whole.setdefault(path, []).append(norm)
            lost.setdefault(path, []).append(dropped)
            if form != "dense":
                norms = stored[f"{name}.task_vectors.norms"]
                assert norms.dtype == torch.float32
                assert norms[k].tolist() == pytest.approx([norm, dropped], rel=1e-5, abs=1e-6)
    planned = json.loads(command("plan", tmp_path / "recipe.yaml", "--measure", "--json")[1])["modules"]
    inspected = json.loads(command("inspect", tmp_path / "out", "--json")[1])["modules"]
    assert [module["path"] for module in planned] == list(whole)
    for ours, theirs in zip(planned, inspected, strict=True):
        for numbers in (ours, theirs):
            for key in ("norm", "dropped", "error"):
                numbers[key] = pytest.approx(numbers[key], rel=1e-4, abs=1e-6)
        assert ours == theirs
        norm, dropped = (float(torch.tensor(side[ours["path"]]).norm()) for side in (whole, lost))
        if form != "dense":  # whose norms nobody takes: nothing is lost
            assert norm == ours["norm"]
            assert dropped == ours["dropped"]
        assert (0.0 if form == "dense" else dropped / norm) == ours["error"]


def size_in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


def test_the_tables_show_each_module_and_each_form(tmp_path: Path, command: Command) -> None:
    open_clip_family(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: e0}, {model: e1}]\nmerge_method: task_arithmetic\nrules:\n"
        f"  - {{match: visual.**.0.mlp, merge_method: wemoe, parameters: {{task_vectors: {SPARSE}}}}}\n"
        f"  - {{match: visual.**.1.mlp, merge_method: wemoe, parameters: {{task_vectors: {FORMS['energy']}}}}}\n"
        "  - {match: transformer.**.mlp, merge_method: wemoe}\n"
    )
    source = load_recipe(tmp_path / "recipe.yaml")
    plan = plan_merge(source)
    merge(source, plan, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "wemoe.safetensors")
    texts = [
        command("plan", tmp_path / "recipe.yaml", "--measure")[1],
        command("inspect", tmp_path / "out")[1],
    ]
    tables = [[line for line in text.splitlines() if ".mlp " in line and "%" in line] for text in texts]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 4
    for line in tables[0]:
        path = line.split()[0]
        own = {name: t for name, t in stored.items() if name.startswith(f"{path}.")}
        kept = sum(t.numel() for name, t in own.items() if not name.endswith((".indices", ".norms")))
        assert f" {kept:,} " in line
        (size,) = re.findall(r"[\d.]+ kB", line)
        assert size_in_bytes(size) == pytest.approx(sum(t.nbytes for t in own.values()), rel=0.01)
    for form, tower in (("sparse", "visual.transformer.resblocks.0"), ("low_rank", "visual.transformer.resblocks.1")):
        norms = torch.cat([t for name, t in stored.items() if name.startswith(tower) and name.endswith(".norms")])
        error = norms[:, 1].double().norm() / norms[:, 0].double().norm()
        lines = [line for text in texts for line in text.splitlines() if line.startswith(f"{form}: ")]
        assert lines[0] == lines[1]
        assert lines[0].startswith(f"{form}: {error:.2%} of the task vectors' norm is lost, with ")
    assert not any(line.startswith("dense: ") for text in texts for line in text.splitlines())


def test_measuring_is_what_merging_loses(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    stored = merged(tmp_path, FORMS["energy"])
    source = load_recipe(tmp_path / "recipe.yaml")
    found = losses(settle(source, plan_merge(source)), jobs=3)
    norms = [t for name in vectors(tmp_path) for t in stored[f"{name}.task_vectors.norms"]]
    assert torch.equal(torch.tensor([[loss.norm, loss.dropped] for loss in found]), torch.stack(norms))


def test_an_expert_that_is_the_base_again_is_all_zeros(tmp_path: Path, command: Command) -> None:
    """Another file with the same values: only reading it shows that it did not move."""
    models = open_clip_family(tmp_path)
    (tmp_path / "e1" / WEIGHTS).unlink()
    (tmp_path / "e1" / "open_clip_config.json").unlink()
    (tmp_path / "e1").rmdir()
    save_open_clip(models[0], tmp_path / "e1")
    for form in ("sparse", "rank", "energy", "limit"):
        stored = merged(tmp_path, FORMS[form], out=form)
        for name, own in vectors(tmp_path).items():
            assert stored_vectors(stored, tmp_path / form, name, own[0].shape)[1].eq(0).all()
            assert stored[f"{name}.task_vectors.norms"][1].tolist() == [0.0, 0.0]
        assert command("verify", tmp_path / form)[0] == 0


def test_threads_and_ranges_change_no_byte_of_any_form(tmp_path: Path) -> None:
    open_clip_family(tmp_path, dtype=torch.bfloat16)
    for form in ("sparse", "rank", "energy"):
        merged(tmp_path, FORMS[form], out=form)
        source = load_recipe(tmp_path / "recipe.yaml")
        plan = settle(source, plan_merge(source))
        for jobs, chunk in ((1, 37), (4, 1000)):
            out = tmp_path / f"{form}{jobs}"
            out.mkdir()
            execute_plan(plan, out, jobs=jobs, chunk_elements=chunk)
            for file in plan.files:
                assert (out / file.name).read_bytes() == (tmp_path / form / file.name).read_bytes()


def compressions(directory: Path, form: str) -> list[Compress]:
    (directory / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: e0}]\nmerge_method: task_arithmetic\n"
        f"rules: [{{match: visual.**.mlp, merge_method: wemoe, parameters: {{task_vectors: {form}}}}}]\n"
    )
    plan = plan_merge(load_recipe(directory / "recipe.yaml"))
    return [operation for operation in plan.operations if isinstance(operation, Compress)]


def test_predicted_memory_follows_what_each_form_needs(tmp_path: Path) -> None:
    """The number of entries that is kept is no rank: a sparse form needs some 24 bytes for each entry of the matrix."""
    open_clip_family(tmp_path, 1)
    elements = 128 * 32
    few, many = (compressions(tmp_path, f"{{form: sparse, density: {d}}}")[0] for d in (0.1, 0.9))
    assert 24 * elements < operation_memory(few, elements, "F32") < 26 * elements
    assert 24 * elements < operation_memory(many, elements, "F32") < 36 * elements
    low, full = (compressions(tmp_path, f"{{form: low_rank, rank: {r}}}")[0] for r in (1, 32))
    assert 12 * elements < operation_memory(low, elements, "F32") < operation_memory(full, elements, "F32")
    assert piece_memory(full, "F32", CHUNK_ELEMENTS) == operation_memory(full, 1, "F32") < 60 * elements


def test_weights_of_a_module_are_all_its_own_whoever_merges_them(tmp_path: Path, command: Command) -> None:
    open_clip_family(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: e0}]\nmerge_method: task_arithmetic\nrules:\n"
        "  - {match: visual.**.c_fc, merge_method: base}\n  - {match: visual.**.mlp, merge_method: wemoe}\n"
    )
    source = load_recipe(tmp_path / "recipe.yaml")
    merge(source, plan_merge(source), tmp_path / "out")
    planned = json.loads(command("plan", tmp_path / "recipe.yaml", "--json")[1])["modules"]
    inspected = json.loads(command("inspect", tmp_path / "out", "--json")[1])["modules"]
    assert planned == inspected
    assert planned[0]["static_parameters"] == 2 * 4096 + 128 + 32


def test_a_bias_is_not_upscaled_without_its_weight(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "base_model: base\nmodels: [{model: e0}]\nmerge_method: task_arithmetic\nrules:\n"
        "  - {match: visual.**.c_fc.weight, merge_method: base}\n  - {match: visual.**.mlp, merge_method: wemoe}\n"
    )
    with pytest.raises(
        PlanError, match=r"c_fc\.bias is upscaled, but visual\.\S+\.c_fc\.weight.* claim both in one rule"
    ):
        plan_merge(load_recipe(tmp_path / "recipe.yaml"))
