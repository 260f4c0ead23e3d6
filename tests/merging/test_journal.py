"""A journal knows what is done, and only that is not done again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from models import open_clip_family

from wemoe_plugin.merging import executor
from wemoe_plugin.merging.executor import execute_plan
from wemoe_plugin.merging.journal import Journal
from wemoe_plugin.merging.operations import Operation
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.merging.work import Piece, make_worker
from wemoe_plugin.recipe.loading import load_recipe

RECIPE = """\
base_model: base
models: [{model: e0}, {model: e1}]
merge_method: task_arithmetic
rules:
  - {match: visual.**.mlp, merge_method: wemoe, parameters: {task_vectors: {form: low_rank, rank: 2}}}
  - {match: transformer.**.mlp, merge_method: wemoe}
  - {match: visual.**.attn, merge_method: dare_ties, parameters: {density: 0.5}}
"""


class Dying:
    """A worker that goes no further than a number of pieces."""

    def __init__(self, left: int, *arguments: Any) -> None:
        self.worker = make_worker(*arguments)
        self.left = left
        self.ran = 0

    def run(self, operation: Operation, start: int, count: int) -> None:
        if self.ran == self.left:
            raise RuntimeError("killed")
        self.ran += 1
        self.worker.run(operation, start, count)


@pytest.fixture
def plan(tmp_path: Path) -> MergePlan:
    open_clip_family(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return plan_merge(load_recipe(tmp_path / "recipe.yaml"))


def files(directory: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_only_what_was_not_finished_is_done_again(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    execute_plan(plan, tmp_path / "whole", chunk_elements=500)
    ran = []
    for left in (7, 0, 40, 10_000):
        workers: list[Dying] = []

        def dying(*arguments: Any, left: int = left, workers: list[Dying] = workers) -> Dying:
            workers.append(Dying(left, *arguments))
            return workers[-1]

        monkeypatch.setattr(executor, "make_worker", dying)
        with Journal(tmp_path / "journal") as journal:
            try:
                execute_plan(plan, tmp_path / "parts", jobs=1, chunk_elements=500, journal=journal)
            except RuntimeError:
                assert left < 10_000
        ran.append(workers[0].ran)
    assert ran[:3] == [7, 0, 40]
    pieces = sum(1 if o.whole else -(-o.output.elements // 500) for o in plan.operations)
    assert sum(ran) == pieces
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_half_a_record_counts_for_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal") as journal:
        journal.note(Piece(1, 2, 3))
        journal.note(Piece(2**40, 5, 2**50))
    data = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(data[:-5])
    with Journal(tmp_path / "journal") as journal:
        assert journal.done() == {Piece(1, 2, 3)}
        journal.note(Piece(4, 5, 6))
    with Journal(tmp_path / "journal") as journal:
        assert journal.done() == {Piece(1, 2, 3), Piece(4, 5, 6)}
