"""Zero-shot heads are CLIP's, and class names stand for the right labels."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wemoe_plugin.errors import TuningError
from wemoe_plugin.tasks.head import check_labels, choose_class_names, zero_shot_head


def encode(texts: Sequence[str]) -> Tensor:
    """A text tower that counts letters."""
    return torch.tensor([[text.count(c) for c in "abc"] for text in texts], dtype=torch.float32)


def test_class_vectors_are_normalized_means_over_templates() -> None:
    head = zero_shot_head(encode, ["a", "bb"], ["{}", "{}c"], 10.0)
    unit = [F.normalize(encode([text])[0], dim=0) for text in ("a", "ac", "bb", "bbc")]
    expected = torch.stack([F.normalize((unit[0] + unit[1]) / 2, dim=0), F.normalize((unit[2] + unit[3]) / 2, dim=0)])
    torch.testing.assert_close(head.vectors, expected)
    features = torch.randn(5, 3)
    torch.testing.assert_close(head(features), 10 * F.normalize(features, dim=-1) @ expected.T)
    torch.testing.assert_close(head(7 * features), head(features))


def test_classes_that_the_text_tower_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(TuningError, match="cannot tell 'a' from 'aa': are they one class, or does the base lack its"):
        zero_shot_head(encode, ["a", "b", "aa"], ["{}"], 1.0)


def test_class_names_are_the_recipes_or_the_data_sets() -> None:
    assert choose_class_names(["x", "y"], ["00", "01"], "t") == ("x", "y")
    assert choose_class_names(None, ["annual_crop", "forest"], "t") == ("annual crop", "forest")
    assert choose_class_names(["b", "a"], None, "t") == ("b", "a")


def test_class_names_in_another_order_than_the_labels_are_refused() -> None:
    with pytest.raises(TuningError, match=r"t: head\.class_names are the data set's labels in another order.*one, two"):
        choose_class_names(["two", "one"], ["one", "two"], "t")


def test_no_class_names_at_all_are_refused() -> None:
    with pytest.raises(TuningError, match="the data set does not name its labels"):
        choose_class_names(None, None, "t")


def test_labels_outside_of_the_class_names_are_refused() -> None:
    check_labels(torch.tensor([0, 1, 2]), "abc", "t")
    for label in (3, -1):
        with pytest.raises(TuningError, match=f"t: the label {label} lies outside of the 3 class names"):
            check_labels(torch.tensor([0, label]), "abc", "t")
