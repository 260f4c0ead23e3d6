"""A Ray cluster of several processes writes what the threads of one process write, even if it loses some of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import open_clip_family, save_state
from safetensors.torch import load_file

from wemoe_plugin.errors import CheckpointError, PlanError, WemoeError
from wemoe_plugin.merging import ray_engine
from wemoe_plugin.merging.executor import execute_plan
from wemoe_plugin.merging.journal import Journal
from wemoe_plugin.merging.memory import peak_memory
from wemoe_plugin.merging.operations import Combine, Compress, Delegate, Upscale
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.merging.survey import settle
from wemoe_plugin.merging.work import pieces
from wemoe_plugin.recipe.loading import load_recipe

pytest.importorskip("ray")

RECIPE = """
base_model: base
models: [{model: e0}, {model: e1, parameters: {weight: 0.5}}]
merge_method: task_arithmetic
parameters: {lambda: 0.3}
rules:
- {match: visual.**.0.mlp, merge_method: wemoe, parameters: {task_vectors: {form: low_rank, energy: 0.8}}}
- {match: visual.**.1.mlp, merge_method: wemoe, parameters: {task_vectors: {form: sparse, density: 0.1}}}
- {match: transformer.**.mlp, merge_method: wemoe}
- {match: transformer.**.attn, merge_method: dare_ties, parameters: {density: 0.5}}
"""


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """The module ``ray``, connected to a cluster of two processors."""
    found = ray_engine.import_ray()
    with ray_engine._cluster(found, 2):
        yield found


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MergePlan:
    """Of a recipe that mixes methods, by relative paths; in batches small enough that there are many."""
    open_clip_family(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_engine, "BATCH_BYTES", 20_000)
    source = load_recipe(Path("recipe.yaml"))
    return settle(source, plan_merge(source))


def executed(plan: MergePlan, out: str, **options: Any) -> dict[str, bytes]:
    Path(out).mkdir(exist_ok=True)
    execute_plan(plan, Path(out), **options)
    return {file.name: (Path(out) / file.name).read_bytes() for file in plan.files}


def test_a_cluster_writes_the_bytes_that_threads_write(ray: Any, plan: MergePlan) -> None:
    assert {type(operation) for operation in plan.operations} == {Combine, Compress, Delegate, Upscale}
    assert not plan.operations[0].sources[0].file.is_absolute()
    seen: list[int] = []
    merged = executed(plan, "ray", engine="ray", chunk_elements=300, progress=seen.append)
    assert merged == executed(plan, "threads")
    assert sum(seen) == plan.bytes_read
    assert ray.is_initialized()


def test_a_failure_is_the_same_one_as_with_threads(ray: Any, plan: MergePlan) -> None:
    path = Path("e1") / "open_clip_model.safetensors"
    state = load_file(path)
    state["visual.proj"].view(-1)[-1] = float("nan")
    save_state(state, path)
    plan = plan_merge(load_recipe(Path("recipe.yaml")))
    messages = []
    for engine in ("threads", "ray"):
        with pytest.raises(CheckpointError) as caught:
            executed(plan, engine, engine=engine)
        assert type(caught.value) is CheckpointError
        messages.append(str(caught.value))
    assert messages == [f"{path}: 'visual.proj' holds NaN"] * 2


def test_what_the_journal_knows_is_not_done_again(ray: Any, plan: MergePlan) -> None:
    work = set(pieces(plan, 300))
    handed: list[int] = []

    def interrupted(nbytes: int) -> None:
        handed.append(nbytes)
        if len(handed) == len(work) // 2:
            raise KeyboardInterrupt

    with Journal(Path("journal")) as journal:
        with pytest.raises(KeyboardInterrupt):
            executed(plan, "out", engine="ray", chunk_elements=300, journal=journal, progress=interrupted)
        done = journal.done()
        assert len(done) == len(handed) < len(work)
        handed.clear()
        merged = executed(plan, "out", engine="ray", chunk_elements=300, journal=journal, progress=handed.append)
        assert sum(handed) == plan.bytes_read  # what was done before counts as progress, too
        assert journal.done() == work
        assert journal.path.stat().st_size == 24 * len(work)  # and is noted once, so it was done once
    assert merged == executed(plan, "threads")


def test_the_command(ray: Any, plan: MergePlan, command: Callable[..., tuple[int, str, str]]) -> None:
    for name, options in (("threads", ()), ("ray", ("--engine", "ray"))):
        assert command("recipe.yaml", "--out", name, "--quiet", *options) == (0, "", "")
    manifests = [json.loads((Path(name) / "manifest.json").read_text()) for name in ("threads", "ray")]
    for manifest in manifests:
        del manifest["files"]["README.md"]  # its title is the directory's name
    assert manifests[0] == manifests[1]
    assert command("recipe.yaml", "--engine", "dask")[::2] == (2, "error: --engine dask: is none of threads, ray\n")


def test_batches_at_work_stay_within_the_memory(ray: Any, plan: MergePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one decomposition, the next one waits for its end."""
    largest = peak_memory(plan.operations, plan.dtype, jobs=1)
    at_work: list[int] = []
    wait = ray.wait
    monkeypatch.setattr(ray, "wait", lambda refs, **options: (at_work.append(len(refs)), wait(refs, **options))[1])
    tight = executed(plan, "tight", engine="ray", max_memory=largest)
    assert min(at_work) == 1
    at_work.clear()
    assert executed(plan, "free", engine="ray", jobs=3) == tight
    assert max(at_work) == 3


def test_files_that_a_worker_does_not_see_are_named(ray: Any, plan: MergePlan, monkeypatch: pytest.MonkeyPatch) -> None:

    def elsewhere(held: list[Any], batch: ray_engine.Batch) -> None:
        import dataclasses

        from wemoe_plugin.merging import ray_engine as there

        fetched = there._fetched
        there._fetched = lambda key: dataclasses.replace(fetched(key), directory=Path("/nowhere"))  # type: ignore
        try:
            there.carry_out(held, batch)
        finally:
            there._fetched = fetched

    monkeypatch.setattr(ray_engine, "carry_out", elsewhere)
    with pytest.raises(PlanError, match=r"/nowhere/.*safetensors: Ray's machine .* does not see it; inputs and output"):
        executed(plan, "ray", engine="ray")


def test_batches_are_filled_and_whole_tensors_are_alone(plan: MergePlan) -> None:
    work = list(pieces(plan, 300))
    batches = list(ray_engine._batches(plan.operations, iter(work)))
    assert sorted(piece for batch in batches for piece in batch) == sorted(work)
    assert max(len(batch) for batch in batches) > 1
    for batch in batches:
        assert len(batch) == 1 or not any(plan.operations[piece.operation].whole for piece in batch)


def test_gpus_are_rays_to_give(ray: Any, plan: MergePlan) -> None:
    with pytest.raises(PlanError, match=r"Ray gives each worker a GPU of its own; use --device cuda"):
        executed(plan, "one", engine="ray", device="cuda:1")
    if not ray.cluster_resources().get("GPU"):
        with pytest.raises(PlanError, match=r"no machine of the cluster has a GPU"):
            executed(plan, "two", engine="ray", device="cuda")


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        ray = SimpleNamespace(is_initialized=lambda: False, exceptions=ray_engine.import_ray().exceptions)
        refused = pytest.raises(PlanError, match=rf"RAY_ADDRESS {address}: cannot be reached: .*refused")
        with refused, ray_engine._cluster(ray, None):
            pass


def test_engines_that_are_not_there(plan: MergePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WemoeError, match=r"--engine dask: is none of threads, ray"):
        executed(plan, "one", engine="dask")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WemoeError, match=r"pip install 'wemoe-plugin\[ray\]'"):
        executed(plan, "two", engine="ray")
    assert list(Path("two").iterdir()) == []


def test_what_a_killed_worker_was_at_is_done_again(ray: Any, plan: MergePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker dies in the middle of a batch that has a decomposition, another in one of ranges."""
    doomed = [next(o.output.name for o in plan.operations if o.whole is whole) for whole in (True, False)]
    marks = Path.cwd()

    def dying(held: list[Any], batch: ray_engine.Batch) -> None:
        from wemoe_plugin.merging import ray_engine as there

        class Doomed:
            def __init__(self, *args: Any) -> None:
                self.worker = make_worker(*args)

            def run(self, operation: Any, start: int, count: int) -> None:
                self.worker.run(operation, start, count)
                mark = marks / f"{operation.output.name}.mark"
                if operation.output.name in doomed and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

        make_worker = there.make_worker
        there.make_worker = Doomed  # type: ignore[assignment]
        try:
            there.carry_out(held, batch)
        finally:
            there.make_worker = make_worker

    monkeypatch.setattr(ray_engine, "carry_out", dying)
    with Journal(Path("journal")) as journal:
        merged = executed(plan, "ray", engine="ray", chunk_elements=300, journal=journal)
        assert journal.done() == set(pieces(plan, 300))
    assert len(list(marks.glob("*.mark"))) == 2
    assert merged == executed(plan, "threads")


def test_a_batch_that_kills_every_worker_ends_the_merge(
    ray: Any, plan: MergePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deadly(held: list[Any], batch: ray_engine.Batch) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ray_engine, "carry_out", deadly)
    monkeypatch.setattr(ray_engine, "RETRIES", 1)
    with pytest.raises(PlanError, match=r"Ray lost 2 workers one after the other over the batch that begins with '"):
        executed(plan, "ray", engine="ray")
