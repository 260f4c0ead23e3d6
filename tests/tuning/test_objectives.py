"""The objectives are the formulas they are named after."""

from __future__ import annotations

import math

import torch

from wemoe_plugin.tuning.guard import effective_classes, has_collapsed
from wemoe_plugin.tuning.objectives import distill, entropy, infomax


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_entropy_of_known_predictions() -> None:
    half = logits([0.0, 0.0, -100.0])
    assert math.isclose(entropy(half).item(), math.log(2), rel_tol=1e-12)
    assert math.isclose(entropy(torch.cat([half, logits([100.0, 0.0, 0.0])])).item(), math.log(2) / 2, rel_tol=1e-12)


def test_infomax_prefers_confident_predictions_of_different_classes() -> None:
    same = logits([100.0, 0.0], [100.0, 0.0])
    spread = logits([100.0, 0.0], [0.0, 100.0])
    assert math.isclose(infomax(same).item(), 0.0, abs_tol=1e-9)
    assert math.isclose(infomax(spread).item(), -math.log(2), rel_tol=1e-9)
    assert entropy(same).item() == entropy(spread).item()


def test_distill_is_the_divergence_from_the_teacher() -> None:
    teacher, student = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distill(student, teacher), expected)
    assert abs(distill(teacher + 3.0, teacher).item()) < 1e-12


def test_effective_classes() -> None:
    spread = torch.eye(4)
    assert math.isclose(effective_classes(spread), 4.0)
    assert math.isclose(effective_classes(torch.eye(4)[:1].repeat(9, 1)), 1.0)
    assert has_collapsed(4.0, 1.9)
    assert not has_collapsed(4.0, 2.1)
