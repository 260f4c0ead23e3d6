"""What execution writes is the arithmetic it promises, whatever the threads and ranges."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import open_clip_family, save_open_clip, save_state, transformers_family
from safetensors.torch import load_file

from wemoe_plugin.errors import CheckpointError, PlanError
from wemoe_plugin.merging import executor, tensor_worker, work
from wemoe_plugin.merging.executor import execute_plan
from wemoe_plugin.merging.memory import CHUNK_ELEMENTS, is_plain, operation_memory, piece_memory
from wemoe_plugin.merging.operations import Compress
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.recipe.loading import load_recipe
from wemoe_plugin.task_vectors.low_rank import truncated_svd

HEAD = "base_model: base\nmodels: [{model: e0}, {model: e1, parameters: {weight: 0.5}}]\n"


def planned(directory: Path, text: str) -> MergePlan:
    path = directory / "recipe.yaml"
    path.write_text(HEAD + text)
    return plan_merge(load_recipe(path), shard_bytes=60_000)


def executed(plan: MergePlan, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    out.mkdir()
    execute_plan(plan, out, **options)
    return {name: t for file in plan.files for name, t in load_file(out / file.name).items()}


def digest(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("task_arithmetic\nparameters: {lambda: 0.3}", lambda b, x, y: b + 0.3 * ((x - b) + 0.5 * (y - b))),
        (
            "task_arithmetic\nparameters: {lambda: 0.3, normalize: true}",
            lambda b, x, y: b + 0.3 * ((x - b) + 0.5 * (y - b)) / 1.5,
        ),
        ("linear", lambda b, x, y: (x + 0.5 * y) / 1.5),
        ("linear\nparameters: {normalize: false}", lambda b, x, y: x + 0.5 * y),
        ("base", lambda b, x, y: b),
    ],
)
def test_static_methods(tmp_path: Path, method: str, expected) -> None:  # type: ignore[no-untyped-def]
    states = [model.state_dict() for model in open_clip_family(tmp_path)]
    merged = executed(planned(tmp_path, f"merge_method: {method}\n"), tmp_path / "out")
    assert merged.keys() == states[0].keys()
    for name, tensor in merged.items():
        exact = expected(*(state[name].double() for state in states))
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7)


def test_one_rounding_only(tmp_path: Path) -> None:
    """Half-precision inputs are merged in float32 and rounded once: the result is the nearest one to the exact sum."""
    open_clip_family(tmp_path, dtype=torch.bfloat16)
    states = [load_file(tmp_path / n / "open_clip_model.safetensors") for n in ("base", "e0", "e1")]
    plan = planned(tmp_path, "merge_method: task_arithmetic\nparameters: {lambda: 0.5}\n")
    for name, tensor in executed(plan, tmp_path / "out").items():
        base, x, y = (state[name].double() for state in states)
        exact = base + 0.5 * ((x - base) + 0.5 * (y - base))
        assert torch.equal(tensor, exact.float().to(torch.bfloat16))


def test_dense_task_vectors_are_exact(tmp_path: Path) -> None:
    states = [model.state_dict() for model in open_clip_family(tmp_path)]
    plan = planned(tmp_path, "merge_method: task_arithmetic\nrules: [{match: visual.**.mlp, merge_method: wemoe}]\n")
    written = executed(plan, tmp_path / "out")
    vectors = {name: t for name, t in written.items() if ".task_vectors" in name}
    assert len(vectors) == 8
    for name, tensor in vectors.items():
        own = name.removesuffix(".task_vectors")
        assert torch.equal(tensor, torch.stack([state[own] - states[0][own] for state in states[1:]]))


def test_low_rank_task_vectors_are_the_best_of_their_rank(tmp_path: Path) -> None:
    states = [model.state_dict() for model in open_clip_family(tmp_path)]
    rule = "{match: visual.**.mlp, merge_method: wemoe, parameters: {task_vectors: {form: low_rank, rank: 5}}}"
    written = executed(planned(tmp_path, f"merge_method: task_arithmetic\nrules: [{rule}]\n"), tmp_path / "out")
    downs = [name for name in written if name.endswith(".down")]
    assert len(downs) == 4
    for name in downs:
        own = name.removesuffix(".task_vectors.down")
        downs_of, ups_of = (written[f"{own}.task_vectors.{part}"].split(5) for part in ("down", "up"))
        for k, state in enumerate(states[1:]):
            vector = (state[own] - states[0][own]).double()
            left, values, right = torch.linalg.svd(vector, full_matrices=False)
            best = left[:, :5] * values[:5] @ right[:5]
            torch.testing.assert_close((ups_of[k].T @ downs_of[k]).double(), best, rtol=1e-4, atol=1e-6)
            norm, dropped = written[f"{own}.task_vectors.norms"][k]
            assert float(norm) == pytest.approx(float(vector.norm()))
            assert float(dropped) == pytest.approx(float((vector - best).norm()))


def test_threads_and_ranges_change_no_byte(tmp_path: Path) -> None:
    open_clip_family(tmp_path, dtype=torch.float16)
    rules = "rules: [{match: visual.**.mlp, merge_method: wemoe}]\n"
    plan = planned(tmp_path, f"merge_method: task_arithmetic\nparameters: {{lambda: 0.3}}\n{rules}")
    digests = []
    for i, (jobs, chunk) in enumerate([(1, 1 << 20), (4, 37), (3, 1000)]):
        executed(plan, tmp_path / f"out{i}", jobs=jobs, chunk_elements=chunk)
        digests.append(digest(tmp_path / f"out{i}"))
    assert all(d == digests[0] for d in digests)


def stored_as(directory: Path, name: str, dtype: torch.dtype) -> None:
    path = directory / name / "open_clip_model.safetensors"
    save_state({n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(path).items()}, path)


@pytest.mark.parametrize("dtypes", ["fff", "bbb", "fbd", "dfb", "bdf"])
@pytest.mark.parametrize(
    "method",
    [
        "task_arithmetic\nparameters: {lambda: 0.3, normalize: true}",
        "linear\nparameters: {weight: [0.2, 1.3]}\nout_dtype: bfloat16",
        "task_arithmetic\ndtype: float64\nout_dtype: bfloat16",
        "base\ndtype: float32",
    ],
)
def test_numpy_and_torch_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtypes: str, method: str
) -> None:
    """Whether torch is imported depends on the recipe as a whole and must not show in any tensor."""
    open_clip_family(tmp_path)
    kinds = {"f": torch.float32, "b": torch.bfloat16, "d": torch.float64}
    for name, kind in zip(("base", "e0", "e1"), dtypes, strict=True):
        stored_as(tmp_path, name, kinds[kind])
    plan = planned(tmp_path, f"merge_method: {method}\n")
    assert all(is_plain(operation, plan.dtype) for operation in plan.operations)
    executed(plan, tmp_path / "numpy", chunk_elements=1000)
    monkeypatch.setattr(work, "is_plain", lambda *_: False)
    executed(plan, tmp_path / "torch")
    assert digest(tmp_path / "numpy") == digest(tmp_path / "torch")


def test_a_static_merge_imports_no_torch(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"{HEAD}merge_method: task_arithmetic\n")
    code = (
        "import sys\nfrom wemoe_plugin.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as stop: pass\n"
        "print(stop.code if 'stop' in dir() else 0, 'torch' in sys.modules)"
    )
    args = [str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False"), done.stdout
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_integer_buffers_are_copied_when_all_agree(tmp_path: Path) -> None:
    models = open_clip_family(tmp_path, 0)
    state = {**models[0].state_dict(), "ids": torch.arange(5)}
    for name, shift in (("base", 0), ("e0", 0), ("e1", 0)):
        directory = tmp_path / name
        if name != "base":
            save_open_clip(models[0], directory)
        save_state({**state, "ids": torch.arange(5) + shift}, directory / "open_clip_model.safetensors")
    plan = planned(tmp_path, "merge_method: task_arithmetic\n")
    assert torch.equal(executed(plan, tmp_path / "out")["ids"], torch.arange(5))
    save_state({**state, "ids": torch.arange(5) + 1}, tmp_path / "e1" / "open_clip_model.safetensors")
    plan = planned(tmp_path, "merge_method: task_arithmetic\n")
    with pytest.raises(CheckpointError, match=r"e1/.*the integer buffer 'ids' differs from the base's"):
        executed(plan, tmp_path / "out2")


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")]
)
@pytest.mark.parametrize("name", ["base", "e1"])
@pytest.mark.parametrize("tensor", ["visual.proj", "visual.transformer.resblocks.1.mlp.c_fc.weight"])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float, word: str, name: str, tensor: str) -> None:
    open_clip_family(tmp_path)
    path = tmp_path / name / "open_clip_model.safetensors"
    state = load_file(path)
    state[tensor].view(-1)[-1] = value
    save_state(state, path)
    plan = planned(tmp_path, "merge_method: task_arithmetic\nrules: [{match: visual.**.mlp, merge_method: wemoe}]\n")
    with pytest.raises(CheckpointError) as caught:
        executed(plan, tmp_path / "out")
    assert str(caught.value) == f"{path}: {tensor!r} holds {word}"


def test_large_finite_values_are_not_taken_for_infinite(tmp_path: Path) -> None:
    models = open_clip_family(tmp_path, 2)
    for name in ("base", "e0", "e1"):
        state = {n: t.clone() for n, t in models[0].state_dict().items()}
        state["visual.proj"].fill_(3e38)
        save_state(state, tmp_path / name / "open_clip_model.safetensors")
    merged = executed(planned(tmp_path, "merge_method: task_arithmetic\n"), tmp_path / "out")
    assert torch.equal(merged["visual.proj"], torch.full((32, 16), 3e38))


def test_a_limit_on_memory_makes_ranges_smaller_and_changes_no_byte(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    plan = planned(tmp_path, "merge_method: task_arithmetic\n")
    executed(plan, tmp_path / "free")
    executed(plan, tmp_path / "tight", max_memory=1000, jobs=3)
    assert digest(tmp_path / "free") == digest(tmp_path / "tight")


LOW_RANK = (
    "merge_method: task_arithmetic\nrules: [{match: visual.**.mlp, merge_method: wemoe, parameters: "
    "{task_vectors: {form: low_rank, rank: 2}}}]\n"
)


def test_a_tensor_that_must_be_whole_and_does_not_fit_is_refused_before_work(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    plan = planned(tmp_path, LOW_RANK)
    with pytest.raises(PlanError, match=r"c_fc\.weight' needs .* --max-memory allows 1,000"):
        executed(plan, tmp_path / "out", max_memory=1000)
    assert list((tmp_path / "out").iterdir()) == []


def test_work_waits_until_its_memory_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one decomposition, no two run at the same time."""
    open_clip_family(tmp_path)
    plan = planned(tmp_path, LOW_RANK)
    running: list[int] = []
    most = 0

    def watched(vector: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        time.sleep(0.01)
        result = truncated_svd(vector, rank)
        running.pop()
        return result

    monkeypatch.setattr(tensor_worker, "truncated_svd", watched)
    largest = max(piece_memory(operation, plan.dtype, CHUNK_ELEMENTS) for operation in plan.operations)
    executed(plan, tmp_path / "one", max_memory=largest, jobs=4)
    assert most == 1
    executed(plan, tmp_path / "many", jobs=4)
    assert most > 1


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failure_ends_the_work_of_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    open_clip_family(tmp_path)
    plan = planned(tmp_path, "merge_method: task_arithmetic\n")
    calls: list[int] = []

    class Failing:
        def run(self, *_: Any) -> None:
            calls.append(1)
            raise CheckpointError("broken")

    monkeypatch.setattr(executor, "make_worker", lambda *_: Failing())
    with pytest.raises(CheckpointError, match="broken"):
        executed(plan, tmp_path / "out", jobs=jobs, chunk_elements=10)
    assert len(calls) <= jobs


def test_the_predicted_memory_covers_a_decomposition(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    plan = planned(tmp_path, LOW_RANK)
    compress = next(o for o in plan.operations if isinstance(o, Compress))
    rows, columns = compress.output.shape
    in_float64 = 8 * (rows * columns + min(rows, columns) ** 2)
    assert operation_memory(compress, rows * columns, "F32") > in_float64 + 4 * rows * columns


@pytest.mark.parametrize("value", [1e5, -1e5])
def test_values_too_large_for_the_output_are_refused(tmp_path: Path, value: float) -> None:
    models = open_clip_family(tmp_path, 2)
    for name in ("base", "e0", "e1"):
        state = {n: t.clone() for n, t in models[0].state_dict().items()}
        state["visual.proj"].fill_(value)
        save_state(state, tmp_path / name / "open_clip_model.safetensors")
    plan = planned(tmp_path, "merge_method: task_arithmetic\nout_dtype: float16\n")
    with pytest.raises(PlanError, match=r"'visual.proj' is too large for F16; use out_dtype: bfloat16 or float32"):
        executed(plan, tmp_path / "out")
    plan = planned(tmp_path, "merge_method: ties\ndtype: float16\nout_dtype: float32\n")
    with pytest.raises(CheckpointError, match=r"'visual.proj' does not fit the recipe's dtype"):
        executed(plan, tmp_path / "out2")


def test_progress_adds_up_to_the_bytes_read(tmp_path: Path) -> None:
    transformers_family(tmp_path)
    plan = planned(tmp_path, "merge_method: task_arithmetic\nrules: [{match: mlp, merge_method: wemoe}]\n")
    for chunk in (37, 1 << 20):
        seen: list[int] = []
        executed(plan, tmp_path / f"out{chunk}", chunk_elements=chunk, progress=seen.append)
        assert sum(seen) == plan.bytes_read


def test_inputs_are_left_alone(tmp_path: Path) -> None:
    open_clip_family(tmp_path)
    before = {name: digest(tmp_path / name) for name in ("base", "e0", "e1")}
    executed(planned(tmp_path, "merge_method: task_arithmetic\n"), tmp_path / "out")
    assert {name: digest(tmp_path / name) for name in before} == before


EVERYTHING = """\
merge_method: task_arithmetic
parameters: {lambda: 0.3}
rules:
  - {match: visual.**.0.mlp, merge_method: wemoe, parameters: {task_vectors: {form: low_rank, rank: 2}}}
  - {match: visual.**.1.mlp, merge_method: wemoe, parameters: {task_vectors: {form: sparse, density: 0.1}}}
  - {match: transformer.**.mlp, merge_method: wemoe}
  - {match: visual.**.attn, merge_method: ties, parameters: {density: 0.5}}
  - {match: transformer.**.attn, merge_method: linear}
"""


@pytest.mark.parametrize(
    "device",
    ["cpu:0", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_every_operation_on_another_device(tmp_path: Path, device: str) -> None:
    """``cpu:0`` takes the way of any device: tensors are moved there and back."""
    open_clip_family(tmp_path)
    plan = planned(tmp_path, EVERYTHING)
    expected = executed(plan, tmp_path / "here")
    found = executed(plan, tmp_path / "there", device=device)
    for state in (expected, found):
        for name in [name for name in state if name.endswith(".down")]:  # the signs of singular vectors are free
            state[name] = state.pop(f"{name.removesuffix('down')}up").T @ state[name]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7FFF8000, 0x7F800001])
def test_no_nan_is_rounded_to_a_number(tmp_path: Path, bits: int) -> None:
    """Rounding to bfloat16 adds to the bits; those of some NaN would overflow to zero."""
    open_clip_family(tmp_path)
    path = tmp_path / "e1" / "open_clip_model.safetensors"
    state = load_file(path)
    state["visual.proj"].view(torch.int32).view(-1)[7] = bits
    save_state(state, path)
    plan = planned(tmp_path, "merge_method: task_arithmetic\nout_dtype: bfloat16\n")
    assert all(is_plain(operation, plan.dtype) for operation in plan.operations)
    with pytest.raises(CheckpointError, match=r"'visual\.proj' holds NaN"):
        executed(plan, tmp_path / "out")
