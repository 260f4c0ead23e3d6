"""Ranks chosen by singular values: what they keep, what they cost, and that the merge goes on as any other."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import open_clip_family, save_state
from safetensors.torch import load_file
from snapshots import tree
from torch import Tensor

from wemoe_plugin.checkpoints.ranges import RangeReader
from wemoe_plugin.console import format_size
from wemoe_plugin.errors import CheckpointError, PlanError, RecipeError
from wemoe_plugin.merging.memory import PROCESS_BYTES, spectrum_memory
from wemoe_plugin.merging.operations import Compress
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.merging.survey import compressions, losses, settle, survey_bytes, survey_memory
from wemoe_plugin.merging.tensor_worker import TensorWorker
from wemoe_plugin.pipeline import merge as pipeline
from wemoe_plugin.pipeline.merge import is_merged, merge
from wemoe_plugin.recipe.loading import RecipeFile, load_recipe

Command = Callable[..., tuple[int, str, str]]
WEIGHTS = "open_clip_model.safetensors"
HEAD = (
    "base_model: base\nmodels: [{model: e0}, {model: e1}]\nmerge_method: task_arithmetic\nparameters: {lambda: 0.3}\n"
)
ENERGY = "{form: low_rank, energy: 0.9}"


def rules(**forms: str) -> str:
    """A wemoe rule for the MLPs of each of these towers."""
    lines = [
        f"  - match: {tower}.**.mlp\n    merge_method: wemoe\n"
        f"    parameters: {{router: {{depth: 1, shared: true}}, task_vectors: {form}}}\n"
        for tower, form in forms.items()
    ]
    return "rules:\n" + "".join(lines)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """Experts whose task vectors have singular values that fall at different speeds from different heights."""
    base = open_clip_family(tmp_path)[0].state_dict()
    for seed in range(2):
        generator, state = torch.Generator().manual_seed(seed), dict(base)
        for i, (name, weight) in enumerate(base.items()):
            if ".mlp." in name and weight.ndim == 2:
                left, right = (
                    torch.linalg.qr(torch.randn(n, min(weight.shape), generator=generator)).Q for n in weight.shape
                )
                values = 0.3 * (1 + i % 3) * (0.6 + 0.2 * seed) ** torch.arange(min(weight.shape))
                state[name] = weight + left * values @ right.T
        save_state(state, tmp_path / f"e{seed}" / WEIGHTS)
    return tmp_path


def planned(directory: Path, text: str) -> tuple[RecipeFile, MergePlan]:
    (directory / "recipe.yaml").write_text(HEAD + text)
    source = load_recipe(directory / "recipe.yaml")
    return source, plan_merge(source)


def ranks_of(plan: MergePlan) -> dict[tuple[str, int], int]:
    """By weight and expert."""
    layers = [layer for module in plan.modules for layer in module.layers if layer.form == "low_rank"]
    return {(layer.tensor, k): rank for layer in layers for k, rank in enumerate(layer.sizes)}


def spectra(directory: Path, tower: str) -> dict[tuple[str, int], Tensor]:
    """Singular values of every task vector in the plan's order, straight from the files."""
    base, *experts = (load_file(directory / name / WEIGHTS) for name in ("base", "e0", "e1"))
    return {
        (name, k): torch.linalg.svdvals((state[name] - weight).double())
        for name, weight in base.items()
        if name.startswith(tower) and ".mlp." in name and weight.ndim == 2
        for k, state in enumerate(experts)
    }


def parameters(plan: MergePlan) -> int:
    return plan.base_parameters + plan.vector_parameters + plan.router_parameters


def costs(plan: MergePlan) -> dict[str, int]:
    return {o.output.name: sum(o.output.shape) for o in plan.operations if isinstance(o, Compress)}


def greedy(values: dict[tuple[str, int], Tensor], cost: dict[str, int], room: int) -> dict[tuple[str, int], int]:
    """Rank one for all; then, of all next singular values that fit, the largest square per parameter."""
    ranks = dict.fromkeys(values, 1)
    room -= sum(cost[name] for name, _ in values)
    while True:
        gains = {
            key: float(values[key][rank]) ** 2 / cost[key[0]]
            for key, rank in ranks.items()
            if rank < len(values[key]) and cost[key[0]] <= room
        }
        if not gains:
            return ranks
        best = max(gains, key=lambda key: gains[key])
        ranks[best] += 1
        room -= cost[best[0]]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_each_tensor_and_expert_keeps_the_energy_and_with_one_rank_less_would_not(family: Path, share: float) -> None:
    ranks = ranks_of(settle(*planned(family, rules(visual=f"{{form: low_rank, energy: {share}}}"))))
    found = spectra(family, "visual")
    assert ranks.keys() == found.keys()
    for key, values in found.items():
        squares = values.square()
        assert squares[: ranks[key]].sum() >= share * squares.sum() * (1 - 1e-9)
        assert ranks[key] == 1 or squares[: ranks[key] - 1].sum() < share * squares.sum()
    assert len(set(ranks.values())) > 1


@pytest.mark.parametrize("multiple", [1.1, 1.237, 1.5])
def test_a_limit_is_kept_used_up_and_spent_where_singular_values_are_largest(family: Path, multiple: float) -> None:
    plan = settle(*planned(family, rules(visual=f"{{form: low_rank, max_parameters: {multiple}x}}")))
    limit, found = int(multiple * plan.base_parameters), spectra(family, "visual")
    low_rank = sum(costs(plan)[name] * rank for (name, _), rank in ranks_of(plan).items())
    assert ranks_of(plan) == greedy(found, costs(plan), limit - (parameters(plan) - low_rank))
    assert len(set(ranks_of(plan).values())) > 2
    assert limit - max(costs(plan).values()) < parameters(plan) <= limit


def test_a_limit_that_holds_everything_gives_every_rank(family: Path) -> None:
    plan = settle(*planned(family, rules(visual="{form: low_rank, max_parameters: 9x}")))
    assert set(ranks_of(plan).values()) == {32}


def test_the_files_have_as_many_parameters_as_the_plan_says(family: Path) -> None:
    source, plan = planned(family, rules(visual="{form: low_rank, max_parameters: 1.3x}", transformer=ENERGY))
    merge(source, plan, family / "out")
    stored = [t for file in ("wemoe", "routers") for t in load_file(family / "out" / f"{file}.safetensors").items()]
    static = sum(t.numel() for t in load_file(family / "out" / WEIGHTS).values())
    total = static + sum(t.numel() for name, t in stored if not name.endswith(".norms"))
    assert total == parameters(settle(source, plan))
    assert 1.3 - 160 / static < total / static <= 1.3


def test_several_rules_share_one_limit(family: Path) -> None:
    limited = "{form: low_rank, max_parameters: 1.4x}"
    apart = rules(visual=limited, transformer=limited).replace("shared: true", "shared: false")
    together = apart[: apart.index("  - match: transformer")].replace(
        "match: visual.**.mlp", 'match: ["visual.**.mlp", "transformer.**.mlp"]'
    )
    plans = [settle(*planned(family, text)) for text in (apart, together)]
    assert ranks_of(plans[0]) == ranks_of(plans[1])
    assert parameters(plans[0]) <= 1.4 * plans[0].base_parameters


def test_what_other_rules_take_is_counted_at_the_ranks_they_are_given(family: Path) -> None:
    """At full rank, the bound before anything is read, the first rule alone would take more than the limit."""
    source, plan = planned(
        family, rules(visual="{form: low_rank, energy: 0.5}", transformer="{form: low_rank, max_parameters: 1.2x}")
    )
    bound = sum(costs(plan)[name] * rank for (name, _), rank in ranks_of(plan).items() if name.startswith("visual"))
    assert bound > 0.2 * plan.base_parameters
    settled = settle(source, plan)
    limit = 1.2 * plan.base_parameters
    assert limit - max(costs(plan).values()) < parameters(settled) <= limit


def test_a_limit_too_small_is_refused_before_anything_is_read(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RangeReader, "fill", None)
    with pytest.raises(PlanError) as caught:
        planned(family, rules(visual="{form: low_rank, max_parameters: 1.01x}"))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{family}/recipe.yaml:8: max_parameters: 1.01x leaves no room: base, routers and task ")
    base = sum(weight.numel() for weight in load_file(family / "base" / WEIGHTS).values())
    least = 1 + (4 * 2 * (32 + 128) + 2 * 2 * (128 + 32) + 66) / base  # ranks of one, biases, the shared router
    assert f"of rank one are {least:.3f}x already" in line


def test_a_limit_that_another_rules_energy_uses_up(family: Path) -> None:
    source, plan = planned(
        family, rules(visual="{form: low_rank, energy: 0.999}", transformer="{form: low_rank, max_parameters: 1.3x}")
    )
    with pytest.raises(PlanError, match=r"recipe.yaml:11: max_parameters: 1\.3x leaves no room: .* are 1\.\d+x alr"):
        settle(source, plan)


@pytest.mark.parametrize("form", ["{form: low_rank, energy: 0.9}", "{form: low_rank, max_parameters: 1.2x}"])
def test_no_rank_is_spent_on_what_did_not_move(family: Path, command: Command, form: str) -> None:
    """Files of their own with the base's values: of a tensor that nobody moved one rank of zeros stays."""
    base = load_file(family / "base" / WEIGHTS)
    for expert, blocks in (("e0", "01"), ("e1", "1")):
        state = load_file(family / expert / WEIGHTS)
        for name in state:
            if any(f"visual.transformer.resblocks.{block}.mlp." in name for block in blocks):
                state[name] = base[name]
        save_state(state, family / expert / WEIGHTS)
    source, plan = planned(family, rules(visual=form))
    settled = settle(source, plan)
    ranks = ranks_of(settled)
    for name in costs(plan):
        assert (ranks[name, 0], ranks[name, 1] > 1) == ((0, True) if "resblocks.0" in name else (1, False))
        assert ranks[name, 1] == 0 or "resblocks.0" in name
    if "max" in form:
        limit = 1.2 * plan.base_parameters
        assert limit - max(costs(plan).values()) < parameters(settled) <= limit
    merge(source, plan, family / "out")
    assert command("verify", family / "out")[0] == 0


def test_several_limits_are_a_mistake_with_its_line(family: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(
            family,
            rules(
                visual="{form: low_rank, max_parameters: 1.3x}", transformer="{form: low_rank, max_parameters: 1.4x}"
            ),
        )
    assert str(caught.value) == (
        f"{family}/recipe.yaml:11: rules[1].parameters.task_vectors.max_parameters: is one limit for the whole model; "
        "an earlier rule says 1.3x"
    )


def contents(directory: Path) -> dict[str, bytes]:
    about = ("README.md", "manifest.json")  # they name the directory, and what the merge was made from
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in about}


OPEN = rules(visual="{form: low_rank, max_parameters: 1.35x}", transformer=ENERGY)


def test_open_ranks_merge_to_what_the_settled_plan_does(family: Path) -> None:
    source, plan = planned(family, OPEN)
    settled = settle(source, plan, jobs=1)
    assert (plan.settled, settled.settled) == (False, True)
    assert settle(source, plan, jobs=3) == settled
    assert settle(source, settled) is settled
    merge(source, plan, family / "open", jobs=3)
    merge(source, settled, family / "settled")
    assert contents(family / "open") == contents(family / "settled")
    config = json.loads((family / "open" / "wemoe_config.json").read_text())
    layers = {
        f"{module['path']}.{layer['path']}.weight": layer for module in config["modules"] for layer in module["layers"]
    }
    assert {(name, k): r for name, layer in layers.items() for k, r in enumerate(layer["ranks"])} == ranks_of(settled)


def test_a_merge_of_open_ranks_that_was_killed_goes_on(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plan = planned(family, OPEN)
    merge(source, plan, family / "whole")
    before, seen, ran = tree(family), [], []
    looks = len(compressions(plan))  # at singular values, before the merge

    def dying(_: int) -> None:
        seen.append(1)
        if len(seen) == looks + 20:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the dead clean nothing up
        with pytest.raises(RuntimeError, match="killed"):
            merge(source, plan, family / "out", jobs=1, progress=dying)
    assert not (family / "out").exists()
    run = TensorWorker.run
    monkeypatch.setattr(TensorWorker, "run", lambda *args: (ran.append(1), run(*args))[1])
    source, plan = planned(family, OPEN)
    merge(source, plan, family / "out", resume=True)
    assert len(ran) == len(settle(source, plan).operations) - 20
    assert contents(family / "out") == contents(family / "whole")
    assert {name: data for name, data in tree(family).items() if not name.startswith("out")} == before


def test_other_ranks_are_not_gone_on_with(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe is the same, its inputs too; that singular values came out otherwise must not mix two layouts."""
    source, plan = planned(family, OPEN)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(pipeline, "execute_plan", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(source, plan, family / "out")
    values = TensorWorker.singular_values
    monkeypatch.setattr(TensorWorker, "singular_values", lambda *args: values(*args) ** 0.5)
    with pytest.raises(PlanError, match="was made from another recipe, other inputs or with other options"):
        merge(source, plan, family / "out", resume=True)


def test_what_is_merged_is_known_without_singular_values(
    family: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = planned(family, OPEN)
    merge(source, plan, family / "out")
    monkeypatch.setattr(TensorWorker, "singular_values", None)
    assert is_merged(*planned(family, OPEN), family / "out", "cpu", None)
    status, said, _ = command(family / "recipe.yaml", "--out", family / "out", "--resume")
    assert (status, "merged already" in said) == (0, True)
    assert not is_merged(*planned(family, OPEN.replace("0.9", "0.8")), family / "out", "cpu", None)
    (family / "e1" / WEIGHTS).touch()
    assert not is_merged(*planned(family, OPEN), family / "out", "cpu", None)


def test_a_plan_says_which_ranks_are_open_and_reads_no_tensor(
    family: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RangeReader, "fill", None)
    tails = {}
    for kind, text in (
        ("energy", rules(visual=ENERGY)),
        ("limit", rules(visual="{form: low_rank, max_parameters: 1.3x}")),
    ):
        planned(family, text)
        status, tails[kind], _ = command("plan", family / "recipe.yaml")
        assert status == 0
        assert "more room than dense" not in tails[kind]
        assert tails[kind].count("?") == 2  # a loss for each module
        assert not json.loads(command("plan", family / "recipe.yaml", "--json")[1])["settled"]
    assert "ranks are upper bounds: they are chosen by singular values; --measure shows them" in tails["energy"]
    assert "= at most 2.0" in tails["energy"]
    assert "ranks are an even share of max_parameters: they are chosen by singular" in tails["limit"]
    (about,) = re.findall(r"= about (\S+) x the base", tails["limit"])
    assert 1.25 < float(about) <= 1.3


def test_a_plan_that_measures_has_no_open_ranks(family: Path, command: Command) -> None:
    source, plan = planned(family, OPEN)
    status, said, _ = command("plan", family / "recipe.yaml", "--measure")
    assert status == 0
    assert "--measure" not in said
    assert "?" not in said
    found = json.loads(command("plan", family / "recipe.yaml", "--measure", "--json")[1])
    assert found["settled"]
    assert found["parameters"]["task_vectors"] == settle(source, plan).vector_parameters
    assert found["peak_memory"] >= survey_memory(source, plan, 1)


def test_progress_counts_the_look_at_singular_values_and_what_is_told_has_the_chosen_ranks(
    family: Path, command: Command
) -> None:
    source, plan = planned(family, OPEN)
    done: list[int] = []
    settled = merge(source, plan, family / "out", progress=done.append)
    assert sum(done) == survey_bytes(source, plan) + plan.bytes_read
    assert 0 < survey_bytes(source, plan) < plan.bytes_read
    written = sum(path.stat().st_size for path in (family / "out").glob("*.safetensors"))
    assert 0 <= written - settled.bytes_written < 20_000  # headers and routers
    assert settled.bytes_written < plan.bytes_written
    done.clear()
    losses(settled, progress=done.append)
    assert sum(done) == sum(s.nbytes for o in compressions(settled) for s in o.sources)
    _, said, _ = command(family / "recipe.yaml", "--out", family / "other")
    assert f"into {format_size(settled.bytes_written)} in" in said


def test_limits_of_a_plan_that_measures(family: Path, command: Command) -> None:
    planned(family, OPEN)
    assert command("plan", family / "recipe.yaml", "--measure", "--max-memory", "1GiB", "--jobs", "1")[0] == 0
    status, _, err = command("plan", family / "recipe.yaml", "--measure", "--max-memory", "5000")
    assert (status, "bytes at once; --max-memory allows 5,000" in err) == (2, True)
    for option in (("--max-memory", "1GiB"), ("--device", "cuda")):
        status, _, err = command("plan", family / "recipe.yaml", *option)
        assert (status, "--max-memory and --device are for --measure" in err) == (2, True)


def test_compressed_tensors_larger_than_dense_are_told(family: Path, command: Command) -> None:
    """Also where the first expert did not move and has nothing stored."""
    (family / "still").mkdir()
    adapter = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["text_projection"]}
    (family / "still" / "adapter_config.json").write_text(json.dumps(adapter))
    save_state(
        {"base_model.model.text_projection": torch.zeros(16, 16)}, family / "still" / "adapter_model.safetensors"
    )
    for moved, told in ((1, False), (5, True)):  # at 1.2 times their dense size, those that moved outweigh the other
        models = ", ".join(["{model: base+still}", *(f"{{model: e1, name: m{k}}}" for k in range(moved))])
        text = HEAD.replace("{model: e0}, {model: e1}", models) + rules(visual="{form: low_rank, rank: 31}")
        (family / "recipe.yaml").write_text(text)
        said = command("plan", family / "recipe.yaml")[1]
        assert ("compressed, 4 tensors take more room than dense" in said) is told


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many singular value decompositions run at a time."""
    running, most, lock = [0], [0], threading.Lock()
    values = TensorWorker.singular_values

    def counting(worker: TensorWorker, operation: Compress) -> Tensor:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.005)
        result = values(worker, operation)
        with lock:
            running[0] -= 1
        return result

    monkeypatch.setattr(TensorWorker, "singular_values", counting)
    return most


def test_a_limit_on_memory_holds_for_singular_values(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plan = planned(family, OPEN)
    largest = max(spectrum_memory(o, plan.dtype) for o in plan.operations if isinstance(o, Compress))
    assert largest >= 12 * 128 * 32
    most = watched(monkeypatch)
    one = settle(source, plan, jobs=4, max_memory=2 * largest - 1)
    assert most == [1]
    assert settle(source, plan, jobs=4) == one
    assert most[0] > 1
    with pytest.raises(PlanError, match=rf"c_fc\.weight' needs {largest:,} bytes at once; --max-memory allows 5,000"):
        settle(source, plan, max_memory=5000)
    assert survey_memory(source, plan, 2) == 2 * largest + PROCESS_BYTES["torch"]
    assert survey_memory(*planned(family, rules(visual="{form: low_rank, rank: 2}")), 2) == 0


@pytest.mark.parametrize(("value", "message"), [(math.nan, "holds NaN"), (-math.inf, "holds infinity")])
def test_values_that_are_not_finite_are_named_and_nothing_is_left(family: Path, value: float, message: str) -> None:
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    state = load_file(family / "e1" / WEIGHTS)
    state[name][3, 3] = value
    save_state(state, family / "e1" / WEIGHTS)
    source, plan = planned(family, OPEN)
    before = tree(family)
    with pytest.raises(CheckpointError) as caught:
        merge(source, plan, family / "out")
    assert str(caught.value) == f"{family / 'e1' / WEIGHTS}: {name!r} {message}"
    assert tree(family) == before


@pytest.mark.parametrize("form", [ENERGY, "{form: low_rank, rank: 2}", "{form: sparse, density: 0.1}"])
def test_a_task_vector_that_overflows_is_named(family: Path, form: str) -> None:
    """Both models are finite, their difference is not."""
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    for model, value in (("base", 3e38), ("e1", -3e38)):
        state = load_file(family / model / WEIGHTS)
        state[name][3, 3] = value
        save_state(state, family / model / WEIGHTS)
    with pytest.raises(PlanError, match=rf"{name}.*' is too large for F32"):
        merge(*planned(family, rules(visual=form)), family / "out")


def test_an_input_that_changes_before_its_singular_values_are_read(family: Path) -> None:
    source, plan = planned(family, OPEN)
    (family / "e1" / WEIGHTS).touch()
    with pytest.raises(CheckpointError, match="was changed while it was being merged"):
        settle(source, plan)


def test_progress_is_what_was_read(family: Path) -> None:
    source, plan = planned(family, rules(visual=ENERGY))
    seen: list[Any] = []
    settle(source, plan, progress=seen.append)
    assert sum(seen) == 4 * 2 * 2 * 4 * 128 * 32  # four tensors, two experts, each with the base, float32
