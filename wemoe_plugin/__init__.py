"""Merge fine-tuned models into one, statically or as a weight-ensembling mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wemoe_plugin.errors import CheckpointError, PlanError, RecipeError, TuningError, WemoeError
    from wemoe_plugin.merging.plan import MergePlan, plan_merge
    from wemoe_plugin.modeling.attach import attach
    from wemoe_plugin.modeling.ensembled_linear import EnsembledLinear
    from wemoe_plugin.modeling.loading import load_model
    from wemoe_plugin.modeling.router import Router
    from wemoe_plugin.modeling.wemoe import WeightEnsemblingMoE
    from wemoe_plugin.pipeline.evaluate import evaluate_directory
    from wemoe_plugin.pipeline.merge import merge
    from wemoe_plugin.pipeline.tune import tune_directory
    from wemoe_plugin.pipeline.workbench import Workbench
    from wemoe_plugin.recipe.loading import load_recipe

_HOMES = {
    "CheckpointError": "errors",
    "EnsembledLinear": "modeling.ensembled_linear",
    "MergePlan": "merging.plan",
    "PlanError": "errors",
    "RecipeError": "errors",
    "Router": "modeling.router",
    "TuningError": "errors",
    "WeightEnsemblingMoE": "modeling.wemoe",
    "WemoeError": "errors",
    "Workbench": "pipeline.workbench",
    "attach": "modeling.attach",
    "evaluate_directory": "pipeline.evaluate",
    "load_model": "modeling.loading",
    "load_recipe": "recipe.loading",
    "merge": "pipeline.merge",
    "plan_merge": "merging.plan",
    "tune_directory": "pipeline.tune",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that ``wemoe-merge --help`` need not import torch."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'wemoe_plugin' has no attribute {name!r}")
    return getattr(importlib.import_module(f"wemoe_plugin.{_HOMES[name]}"), name)
