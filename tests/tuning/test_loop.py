"""The loop tunes what it was given, keeps the best, and goes back when predictions collapse."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wemoe_plugin.errors import TuningError
from wemoe_plugin.tuning.loop import Check, TuningOutcome, TuningTask, tune

OPTIONS: dict[str, Any] = {
    **{"objective": "distill", "steps": 60, "learning_rate": 0.1, "batch_size": 4},
    **{"hold_out": 8, "check_every": 20, "seed": 0},
}


class Recorder:
    """Inputs of a task, with a note of the rows that were asked for."""

    def __init__(self, rows: int, seed: int) -> None:
        self.values = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
        self.asked: list[list[int]] = []

    def __call__(self, rows: Sequence[int]) -> Tensor:
        self.asked.append(list(rows))
        return self.values[list(rows)]


def setting(rows: int = 40) -> tuple[nn.Linear, list[TuningTask], list[Recorder]]:
    torch.manual_seed(0)
    model, teacher = nn.Linear(3, 4), nn.Linear(3, 4)
    recorders = [Recorder(rows, seed) for seed in (1, 2)]
    tasks = [
        TuningTask(f"t{i}", rows, recorder, lambda features: features, teacher(recorder.values).detach())
        for i, recorder in enumerate(recorders)
    ]
    return model, tasks, recorders


def run(model: nn.Module, tasks: list[TuningTask], **changes: Any) -> TuningOutcome:
    return tune(model, list(model.parameters()), lambda m, x: m(x), tasks, **{**OPTIONS, **changes})


def test_distill_reaches_the_teacher() -> None:
    model, tasks, _ = setting()
    outcome = run(model, tasks, steps=200)
    assert outcome.checks[0].step == 0
    assert outcome.checks[-1].held_out < 0.01 * outcome.checks[0].held_out
    assert outcome.collapsed == ()


def test_only_the_given_parameters_change() -> None:
    model, tasks, _ = setting()
    before = copy.deepcopy(model.state_dict())
    tune(model, [model.bias], lambda m, x: m(x), tasks, **OPTIONS)
    assert torch.equal(model.weight, before["weight"])
    assert not torch.equal(model.bias, before["bias"])


def test_held_out_rows_are_never_trained_on_and_every_other_row_is() -> None:
    model, tasks, recorders = setting(rows=20)
    run(model, tasks, steps=6, check_every=100)
    for recorder in recorders:
        first_look, *rest = recorder.asked
        batches, last_look = rest[:-1], rest[-1]
        assert sorted(first_look) == sorted(last_look)
        assert len(first_look) == 8
        trained = [row for batch in batches for row in batch]
        assert set(trained) | set(first_look) == set(range(20))
        assert not set(trained) & set(first_look)
        assert sorted(trained[:12]) == sorted(set(trained))


def test_the_best_routers_are_kept_not_the_last() -> None:
    model, tasks, _ = setting()
    states: dict[int, dict[str, Tensor]] = {}

    def remember(check: Check) -> None:
        states[check.step] = copy.deepcopy(model.state_dict())

    outcome = run(model, tasks, learning_rate=5.0, on_check=remember, check_every=5)
    losses = {check.step: check.held_out for check in outcome.checks}
    assert outcome.best_step == min(losses, key=lambda step: losses[step])
    assert outcome.best_step != max(losses)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in states[outcome.best_step].items())


def test_collapse_is_noticed_and_undone() -> None:
    """With one weight per class and no input, entropy is lowest where every row gets the same class."""
    model, tasks, _ = setting()
    with torch.no_grad():
        model.weight.copy_(torch.eye(4)[:, :3] * 0.5)
        model.bias.copy_(torch.tensor([0.05, 0.0, 0.0, 0.0]))
    outcome = tune(
        model, [model.bias], lambda m, x: m(x), tasks, **{**OPTIONS, "objective": "entropy", "learning_rate": 0.3}
    )
    assert outcome.collapsed
    assert outcome.checks[-1].step < OPTIONS["steps"]
    assert outcome.checks[-1].held_out < outcome.checks[0].held_out
    assert outcome.best_step == 0
    assert torch.equal(model.bias, torch.tensor([0.05, 0.0, 0.0, 0.0]))


def test_the_same_seed_gives_the_same_routers() -> None:
    results = []
    for seed in (0, 0, 1):
        model, tasks, _ = setting()
        run(model, tasks, seed=seed)
        results.append(model.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("objective", ["distill", "entropy", "infomax"])
def test_every_objective_lowers_its_own_loss(objective: str) -> None:
    model, tasks, _ = setting()
    outcome = run(model, tasks, objective=objective, learning_rate=0.02, steps=40)
    assert outcome.checks[outcome.best_step // 20].held_out < outcome.checks[0].held_out


def test_unusable_settings_are_refused() -> None:
    model, tasks, _ = setting()
    with pytest.raises(TuningError, match="no tasks"):
        run(model, [])
    with pytest.raises(TuningError, match="at least two rows"):
        run(model, [TuningTask("t", 1, tasks[0].inputs, tasks[0].head, tasks[0].teacher)])
    with pytest.raises(TuningError, match="distill needs the predictions"):
        run(model, [TuningTask("t", 40, tasks[0].inputs, tasks[0].head)])
    with pytest.raises(TuningError, match="not finite before any step"):
        run(model, [TuningTask("t", 40, tasks[0].inputs, lambda f: f * float("nan"), tasks[0].teacher)])
    with pytest.raises(TuningError, match="not finite at step"):
        run(model, tasks, learning_rate=3e37)
