"""How large the task vectors of an upscaled weight are: ranks of the low-rank form, entries of the sparse one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wemoe_plugin.checkpoints.sources import AdaptedTensor, Source, is_change_of, is_same
from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.plan import is_parameter
from wemoe_plugin.merging.upscaling import UpscaledModule
from wemoe_plugin.recipe.loading import RecipeFile
from wemoe_plugin.recipe.schema import Recipe, TaskVectorSpec

Ranks = Mapping[str, tuple[int, ...]]
"""By the name of a weight: the rank of each expert's task vector."""


@dataclass(frozen=True)
class Sizes:
    """What is known of sizes.

    Attributes:
        ranks: those that singular values have decided, if they have.
        even_rank: the rank of weights under ``max_parameters`` until then.
    """

    ranks: Ranks | None = None
    even_rank: int = 1

    def of(self, spec: TaskVectorSpec, name: str, base: Source, experts: Iterable[Source]) -> tuple[int, ...]:
        """Per expert, the rank of a weight's task vector or the entries of it that are kept.

        Raises:
            PlanError: the sparse form cannot address so large a weight.
        """
        if spec.density is not None:
            if base.elements >= 2**31:
                raise PlanError(f"{name} has too many elements for the sparse form, whose places have 32 bits")
            return (max(1, round(spec.density * base.elements)),) * len(tuple(experts))
        if self.ranks is not None and name in self.ranks:
            return self.ranks[name]
        most = spec.rank or (self.even_rank if spec.max_parameters else min(base.shape))
        ranks = tuple(min(most, highest_rank(expert, base)) for expert in experts)
        return ranks if any(ranks) else (1, *ranks[1:])


def highest_rank(expert: Source, base: Source) -> int:
    """The rank that an expert's task vector can have, as far as it can be told without reading it."""
    if is_same(expert, base):
        return 0
    own = expert.down.shape[0] if isinstance(expert, AdaptedTensor) and is_change_of(expert, base) else min(base.shape)
    return min(own, *base.shape)


def task_vectors_of(recipe: Recipe, module: UpscaledModule) -> TaskVectorSpec:
    """How the rule of a module wants its task vectors."""
    return recipe.rules[module.rule].parameters.task_vectors or TaskVectorSpec()


def even_rank(source: RecipeFile, tensors: Mapping[str, Source], modules: Iterable[UpscaledModule]) -> int:
    """The rank within ``max_parameters`` were it the same for all tensors and experts the limit is for.

    Args:
        source: the recipe.
        tensors: the base's.
        modules: planned with an even rank of one.

    Raises:
        PlanError: there is no room for a rank of one.
    """
    base = sum(tensor.elements for tensor in tensors.values())
    modules = tuple(modules)
    least = base + sum(router.parameters for router in {m.router.name: m.router for m in modules}.values())
    limit, each = 0.0, 0
    for module in modules:
        spec = task_vectors_of(source.recipe, module)
        for layer in module.layers:
            if spec.open_rank is None or layer.form == "dense":
                least += sum(math.prod(shape) for name, shape in layer.vectors if is_parameter(name))
                continue
            rank_one = sum(map(bool, layer.sizes)) * sum(tensors[layer.tensor].shape)
            least += rank_one
            if spec.max_parameters is not None:
                limit, each = spec.max_parameters, each + rank_one
    room = int(limit * base) - least
    if room < 0:
        raise no_room(source, limit, least, base)
    return 1 + room // each


def no_room(source: RecipeFile, multiple: float, parameters: int, base_parameters: int) -> PlanError:
    """A limit on parameters below what ranks of one take."""
    rule = next(i for i, r in enumerate(source.recipe.rules) if (s := r.parameters.task_vectors) and s.max_parameters)
    where = source.where("rules", rule, "parameters", "task_vectors", "max_parameters")
    return PlanError(
        f"{where}: max_parameters: {multiple:g}x leaves no room: base, routers and task vectors of rank one are "
        f"{parameters / base_parameters:.3f}x already; shared or shallower routers are smaller"
    )
