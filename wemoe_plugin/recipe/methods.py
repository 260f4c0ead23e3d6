"""The merge methods a recipe may name, and what each takes: one table for checks, plans and documents.

Ours are ``task_arithmetic``, ``linear`` and ``base``, which stream by ranges of elements, and ``iso_c`` and ``tsv_m``.
All others are mergekit's; a test holds this table against its registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["number", "integer", "flag"]
Scope = Literal["all", "model"]
"""One value for all models, or one for each of them (mergekit: shared, and per input)."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method.

    Attributes:
        kind: what its values are.
        scope: whether every model has its own value.
        default: where the recipe says nothing; None if it must say something (or, for ``scale``, if none applies).
        required: whether the recipe must say something.
    """

    kind: Kind
    scope: Scope = "all"
    default: float | bool | None = None
    required: bool = False


@dataclass(frozen=True)
class Method:
    """A static merge method.

    Attributes:
        title: its name in prose.
        source: where it is described.
        parameters: by name.
        base: whether it needs the base, can use it, or takes it for one model among the others.
        inputs: the fewest and the most tensors it takes, the base among them; None for any number.
        others: the same without the base.
        random: whether it draws numbers; then every tensor has its own seed.
        idle: parameters that mergekit accepts for it and that change nothing.
    """

    title: str
    source: str
    parameters: Mapping[str, Parameter]
    base: Literal["required", "optional", "ignored"] = "required"
    inputs: tuple[int, int | None] = (1, None)
    others: tuple[int, int | None] = (0, None)
    random: bool = False
    idle: tuple[str, ...] = ()


_WEIGHT = Parameter("number", "model", 1.0)
_DELTAS: Mapping[str, Parameter] = {"lambda": Parameter("number", default=1.0), "weight": _WEIGHT}


def _sparsified(
    title: str, arxiv: str, *, normalize: bool, rescale: bool, random: bool = False, **more: Parameter
) -> Method:
    """One of mergekit's generalized task arithmetics: prune every task vector, then add them up."""
    parameters = {
        **_DELTAS,
        "density": Parameter("number", "model", 1.0),
        "normalize": Parameter("flag", default=normalize),
        "rescale": Parameter("flag", default=rescale),
        "int8_mask": Parameter("flag", default=False),
        **more,
    }
    return Method(title, f"https://arxiv.org/abs/{arxiv}", parameters, random=random)


_GAMMA, _EPSILON = Parameter("number", "model", 0.01), Parameter("number", "model", 0.15)

OURS: Mapping[str, Method] = {
    "task_arithmetic": Method(
        "Task arithmetic",
        "https://arxiv.org/abs/2212.04089",
        {**_DELTAS, "normalize": Parameter("flag", default=False)},
        idle=("density", "rescale", "int8_mask"),
    ),
    "linear": Method(
        "Weighted average",
        "https://arxiv.org/abs/2203.05482",
        {"weight": _WEIGHT, "normalize": Parameter("flag", default=True)},
        base="ignored",
    ),
    "base": Method("The base's tensors as they are", "", {}),
    "iso_c": Method("Isotropic merging in common space", "https://arxiv.org/abs/2502.04959", _DELTAS),
    "tsv_m": Method("Task singular vectors", "https://arxiv.org/abs/2412.00081", _DELTAS),
}
"""Carried out here: the first three by ranges, the others on whole tensors."""

STREAMED = ("task_arithmetic", "linear", "base")

MERGEKITS: Mapping[str, Method] = {
    "ties": _sparsified("TIES", "2306.01708", normalize=True, rescale=False),
    "dare_linear": _sparsified("DARE", "2311.03099", normalize=False, rescale=True, random=True),
    "dare_ties": _sparsified("DARE with TIES", "2311.03099", normalize=False, rescale=True, random=True),
    "della": _sparsified("DELLA with TIES", "2406.11617", normalize=True, rescale=True, random=True, epsilon=_EPSILON),
    "della_linear": _sparsified("DELLA", "2406.11617", normalize=False, rescale=True, random=True, epsilon=_EPSILON),
    "breadcrumbs": _sparsified("Model breadcrumbs", "2312.06795", normalize=False, rescale=False, gamma=_GAMMA),
    "breadcrumbs_ties": _sparsified(
        "Model breadcrumbs with TIES", "2312.06795", normalize=False, rescale=False, gamma=_GAMMA
    ),
    "sce": Method(
        "SCE",
        "https://arxiv.org/abs/2408.07990",
        {"select_topk": Parameter("number", default=1.0), "int8_mask": Parameter("flag", default=False)},
    ),
    "ram": Method(
        "Reinforced agent merging",
        "https://arxiv.org/abs/2601.13572",
        {"epsilon": Parameter("number", default=1e-5)},
    ),
    "ramplus_tl": Method(
        "Reinforced agent merging plus",
        "https://arxiv.org/abs/2601.13572",
        {
            "r": Parameter("number", default=0.1),
            "alpha": Parameter("number", default=0.2),
            "epsilon": Parameter("number", default=1e-5),
        },
    ),
    "model_stock": Method(
        "Model stock",
        "https://arxiv.org/abs/2403.19522",
        {"filter_wise": Parameter("flag", default=False)},
        inputs=(3, None),
    ),
    "arcee_fusion": Method("Arcee fusion", "https://arcee.ai", {}, inputs=(2, 2), random=True),
    "slerp": Method(
        "SLERP",
        "https://en.wikipedia.org/wiki/Slerp",
        {"t": Parameter("number", required=True)},
        inputs=(2, 2),
    ),
    "nearswap": Method(
        "NearSwap",
        "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        {"t": Parameter("number", required=True)},
        inputs=(2, 2),
    ),
    "nuslerp": Method(
        "NuSLERP",
        "",
        {
            "weight": _WEIGHT,
            "nuslerp_row_wise": Parameter("flag", default=False),
            "nuslerp_flatten": Parameter("flag", default=True),
        },
        base="optional",
        others=(2, 2),
    ),
    "multislerp": Method(
        "Multi-SLERP",
        "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        {
            "weight": _WEIGHT,
            "normalize_weights": Parameter("flag", default=True),
            "eps": Parameter("number", default=1e-8),
        },
        base="optional",
        others=(1, None),
    ),
    "karcher": Method(
        "Karcher mean",
        "https://arxiv.org/abs/2603.04972",
        {"max_iter": Parameter("integer", default=10), "tol": Parameter("number", default=1e-5)},
        base="ignored",
    ),
    "passthrough": Method("One model as it is", "", {"scale": Parameter("number", "model")}, "ignored", inputs=(1, 1)),
}
"""Carried out by mergekit's kernels, on whole tensors."""

METHODS: Mapping[str, Method] = {**OURS, **MERGEKITS}
"""Every method by the name a recipe gives it; `wemoe` is no static method and stands in rules only."""
