"""Zero-shot heads: class vectors from the base model's own text tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wemoe_plugin.errors import TuningError


@dataclass(frozen=True)
class ZeroShotHead:
    """Scaled cosine similarity to one unit vector per class.

    Attributes:
        class_names: in label order.
        vectors: (classes, embed), each of length one.
        scale: the model's logit scale.
    """

    class_names: tuple[str, ...]
    vectors: Tensor
    scale: float

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (batch, classes) of features (batch, embed)."""
        return self.scale * F.normalize(features, dim=-1) @ self.vectors.to(features).T


@torch.no_grad()
def zero_shot_head(
    encode: Callable[[Sequence[str]], Tensor], class_names: Sequence[str], templates: Sequence[str], scale: float
) -> ZeroShotHead:
    """Average each class over its prompts, as CLIP does (arXiv 2103.00020, section 3.1.4).

    Args:
        encode: from texts to features (texts, embed).
        class_names: in label order.
        templates: prompts with one ``{}``.
        scale: the model's logit scale.

    Raises:
        TuningError: two classes have the same vector.
    """
    vectors = []
    for name in class_names:
        features = F.normalize(encode([template.format(name) for template in templates]), dim=-1)
        vectors.append(F.normalize(features.mean(0), dim=-1))
    head = ZeroShotHead(tuple(class_names), torch.stack(vectors), scale)
    for i, vector in enumerate(vectors):
        twin = next((j for j in range(i) if torch.equal(vectors[j], vector)), None)
        if twin is not None:
            raise TuningError(
                f"the text tower cannot tell {class_names[twin]!r} from {class_names[i]!r}: are they one class, or "
                "does the base lack its tokenizer files?"
            )
    return head


def choose_class_names(given: Sequence[str] | None, stored: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The class names of a task: the recipe's, in label order, or the data set's own.

    Raises:
        TuningError: there are none, or the recipe's names are the data set's in another order.
    """
    if given is None:
        if stored is None:
            raise TuningError(f"{where}: the data set does not name its labels; set head.class_names in label order")
        return tuple(name.replace("_", " ") for name in stored)
    if stored is not None and list(given) != list(stored) and sorted(given) == sorted(stored):
        raise TuningError(
            f"{where}: head.class_names are the data set's labels in another order; the order must be the labels': "
            f"{', '.join(stored)}"
        )
    return tuple(given)


def check_labels(labels: Tensor, class_names: Sequence[str], where: str) -> None:
    """Refuse labels no class name stands for.

    Raises:
        TuningError: a label lies outside of the class names.
    """
    outside = sorted({int(v) for v in labels[(labels < 0) | (labels >= len(class_names))]})
    if outside:
        raise TuningError(f"{where}: the label {outside[0]} lies outside of the {len(class_names)} class names")
