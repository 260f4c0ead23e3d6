"""Merge fine-tuned models into one, statically or as a weight-ensembling mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wemoe_plugin.errors import CheckpointError, PlanError, RecipeError, TuningError, WemoeError
    from wemoe_plugin.merging.mergekit_bridge import register_methods
    from wemoe_plugin.merging.plan import MergePlan
    from wemoe_plugin.merging.planner import plan_merge
    from wemoe_plugin.modeling.attach import attach
    from wemoe_plugin.modeling.ensembled_linear import EnsembledLinear
    from wemoe_plugin.modeling.loading import load_model
    from wemoe_plugin.modeling.router import Router
    from wemoe_plugin.modeling.wemoe import WeightEnsemblingMoE, freeze_all_but_routers
    from wemoe_plugin.pipeline.evaluate import evaluate_directory
    from wemoe_plugin.pipeline.merge import merge
    from wemoe_plugin.pipeline.routers import save_routers
    from wemoe_plugin.pipeline.tune import tune_directory
    from wemoe_plugin.pipeline.workbench import Workbench
    from wemoe_plugin.recipe.loading import load_recipe

__all__ = [
    "CheckpointError",
    "EnsembledLinear",
    "MergePlan",
    "PlanError",
    "RecipeError",
    "Router",
    "TuningError",
    "WeightEnsemblingMoE",
    "WemoeError",
    "Workbench",
    "attach",
    "evaluate_directory",
    "freeze_all_but_routers",
    "load_model",
    "load_recipe",
    "merge",
    "plan_merge",
    "register_methods",
    "save_routers",
    "tune_directory",
]

_HOMES = {
    "errors": ("CheckpointError", "PlanError", "RecipeError", "TuningError", "WemoeError"),
    "merging.mergekit_bridge": ("register_methods",),
    "merging.plan": ("MergePlan",),
    "merging.planner": ("plan_merge",),
    "modeling.attach": ("attach",),
    "modeling.ensembled_linear": ("EnsembledLinear",),
    "modeling.loading": ("load_model",),
    "modeling.router": ("Router",),
    "modeling.wemoe": ("WeightEnsemblingMoE", "freeze_all_but_routers"),
    "pipeline.evaluate": ("evaluate_directory",),
    "pipeline.merge": ("merge",),
    "pipeline.routers": ("save_routers",),
    "pipeline.tune": ("tune_directory",),
    "pipeline.workbench": ("Workbench",),
    "recipe.loading": ("load_recipe",),
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that ``wemoe-merge --help`` need not import torch."""
    import importlib

    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"wemoe_plugin.{module}"), name)
    raise AttributeError(f"module 'wemoe_plugin' has no attribute {name!r}")
