"""The tuning loop: Adam with a cosine schedule on the routers alone, the best of them kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from wemoe_plugin.errors import TuningError
from wemoe_plugin.tuning.guard import effective_classes, has_collapsed
from wemoe_plugin.tuning.objectives import distill, entropy, infomax

Objective = Literal["distill", "entropy", "infomax"]


@dataclass(frozen=True)
class TuningTask:
    """Unlabeled inputs of a task and its head.

    Attributes:
        name: of the task.
        rows: how many inputs there are.
        inputs: from row numbers to a batch of model inputs.
        head: from features (batch, embed) to logits (batch, classes).
        teacher: the expert's logits for every row, (rows, classes); for ``distill`` only.
    """

    name: str
    rows: int
    inputs: Callable[[Sequence[int]], Tensor]
    head: Callable[[Tensor], Tensor]
    teacher: Tensor | None = None


@dataclass(frozen=True)
class Check:
    """A look at the held-out inputs after a number of optimizer steps.

    Attributes:
        step: optimizer steps so far.
        loss: the objective on the batches since the last look, summed over tasks; NaN at step 0.
        held_out: the objective on the held-out inputs, summed over tasks.
        classes: effective number of predicted classes per task.
    """

    step: int
    loss: float
    held_out: float
    classes: tuple[float, ...]


@dataclass
class TuningOutcome:
    """What tuning did; the model holds the best routers.

    Attributes:
        checks: every look at the held-out inputs, the first before any step.
        best_step: optimizer steps after which the kept routers were seen.
        collapsed: names of tasks whose predictions collapsed, which ended tuning.
    """

    checks: list[Check] = field(default_factory=list)
    best_step: int = 0
    collapsed: tuple[str, ...] = ()


def tune(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    encode: Callable[[nn.Module, Tensor], Tensor],
    tasks: Sequence[TuningTask],
    *,
    objective: Objective,
    steps: int,
    learning_rate: float,
    batch_size: int,
    hold_out: int,
    check_every: int,
    seed: int,
    on_check: Callable[[Check], None] | None = None,
) -> TuningOutcome:
    """Tune some parameters of a model in place.

    Args:
        model: any module; only ``parameters`` change.
        parameters: what to tune, the routers' parameters.
        encode: from the model and inputs to features (batch, embed); one call per step for all tasks together.
        tasks: at least one, each with more than one row.
        objective: summed over tasks.
        steps: optimizer steps, each on one batch of every task.
        learning_rate: Adam's at the start; it falls to zero along a cosine.
        batch_size: rows per task and step.
        hold_out: rows per task kept from training to choose the best routers, at most half of the task's rows.
        check_every: steps between two looks at them.
        seed: of the order of the rows.
        on_check: told about every look.

    Raises:
        TuningError: no tasks, too few rows, or a loss that is not finite.
    """
    if not tasks:
        raise TuningError("there are no tasks to tune on")
    splits = [_split(task, hold_out, seed) for task in tasks]
    objective_of = [_objective(objective, task) for task in tasks]
    spreads = [_teachers_spread(objective, task, held) for task, (_, held) in zip(tasks, splits, strict=True)]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    outcome = TuningOutcome()
    best: list[Tensor] = []
    lowest = math.inf
    losses: list[float] = []

    def check(step: int) -> Check:
        nonlocal best, lowest, losses
        total, classes = _look(model, encode, tasks, [held for _, held in splits], objective_of, batch_size)
        seen = Check(step, sum(losses) / len(losses) if losses else math.nan, total, classes)
        losses = []
        outcome.checks.append(seen)
        usual = [min(a, b) for a, b in zip(outcome.checks[0].classes, spreads, strict=True)]
        outcome.collapsed = tuple(t.name for t, a, b in zip(tasks, usual, classes, strict=True) if has_collapsed(a, b))
        if not outcome.collapsed and total < lowest:
            lowest, outcome.best_step = total, step
            best = [parameter.detach().clone() for parameter in parameters]
        if on_check is not None:
            on_check(seen)
        return seen

    if not math.isfinite(check(0).held_out):
        raise TuningError(
            "the objective on the held-out data is not finite before any step; look at the models and data"
        )
    streams = [_stream(train, batch_size, seed + i) for i, (train, _) in enumerate(splits)]
    for step in range(1, steps + 1):
        rows = [next(stream) for stream in streams]
        loss = _loss(model, encode, tasks, rows, objective_of)
        if not torch.isfinite(loss):
            raise TuningError(
                f"the loss is not finite at step {step}; use a smaller learning rate than {learning_rate}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % check_every == 0 or step == steps:
            check(step)
            if outcome.collapsed:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return outcome


_RowObjective = Callable[[Tensor, Sequence[int]], Tensor]


def _objective(name: Objective, task: TuningTask) -> _RowObjective:
    if name == "entropy":
        return lambda logits, rows: entropy(logits)
    if name == "infomax":
        return lambda logits, rows: infomax(logits)
    teacher = task.teacher
    if teacher is None:
        raise TuningError(f"{task.name}: distill needs the predictions of the task's expert")
    return lambda logits, rows: distill(logits, teacher[list(rows)].to(logits))


def _teachers_spread(objective: Objective, task: TuningTask, rows: list[int]) -> float:
    """Over how many classes the expert spreads its predictions: following it there is no collapse."""
    if objective != "distill" or task.teacher is None:
        return math.inf
    return effective_classes(task.teacher[rows])


def _split(task: TuningTask, hold_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to hold out."""
    if task.rows < 2:
        raise TuningError(f"{task.name}: tuning needs at least two rows, it has {task.rows}")
    order = torch.randperm(task.rows, generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(hold_out, task.rows // 2)
    return order[held:], order[:held]


def _stream(rows: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches without end: every row once, then every row again in another order."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def _loss(
    model: nn.Module,
    encode: Callable[[nn.Module, Tensor], Tensor],
    tasks: Sequence[TuningTask],
    rows: Sequence[Sequence[int]],
    objectives: Sequence[_RowObjective],
) -> Tensor:
    features = encode(model, torch.cat([task.inputs(own) for task, own in zip(tasks, rows, strict=True)]))
    parts = torch.split(features, [len(own) for own in rows])
    losses = [f(t.head(part), own) for f, t, part, own in zip(objectives, tasks, parts, rows, strict=True)]
    return torch.stack(losses).sum()


@torch.no_grad()
def _look(
    model: nn.Module,
    encode: Callable[[nn.Module, Tensor], Tensor],
    tasks: Sequence[TuningTask],
    held: Sequence[list[int]],
    objectives: Sequence[_RowObjective],
    batch_size: int,
) -> tuple[float, tuple[float, ...]]:
    total, classes = 0.0, []
    step = max(batch_size * len(tasks), 1)
    for task, rows, objective in zip(tasks, held, objectives, strict=True):
        pieces = [rows[i : i + step] for i in range(0, len(rows), step)]
        logits = torch.cat([task.head(encode(model, task.inputs(piece))) for piece in pieces])
        total += float(objective(logits, rows))
        classes.append(effective_classes(logits))
    return total, tuple(classes)
