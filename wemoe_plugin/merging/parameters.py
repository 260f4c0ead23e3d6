"""What the recipe says a method's parameters are for one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.names import relative_depths
from wemoe_plugin.recipe.methods import METHODS, Scope
from wemoe_plugin.recipe.schema import Recipe, Rule
from wemoe_plugin.recipe.settings import Scalar, Setting

Settings = Mapping[str, Setting]


class ParameterReader:
    """Looks parameters up as mergekit does: a model's own come first, then the rule's, then the recipe's."""

    def __init__(self, recipe: Recipe, tensor_names: Iterable[str]) -> None:
        self.recipe = recipe
        self.depths = relative_depths(tensor_names)
        self.of_models = {entry.name: entry.parameters for entry in recipe.models}

    def find(self, parameter: str, tensor: str, rule: Rule | None, model: str | None = None) -> Scalar | None:
        """A parameter's value for a tensor (of a model), or None where the recipe says nothing."""
        sources: tuple[Settings, ...] = (
            self.of_models.get(model, {}) if model is not None else {},
            rule.parameters.settings if rule is not None else {},
            self.recipe.parameters,
        )
        for settings in sources:
            if parameter in settings:
                value = settings[parameter].evaluate(tensor, self.depths[tensor])
                if value is not None:
                    return value
        return None

    def number(self, parameter: str, tensor: str, rule: Rule | None, model: str | None = None) -> float:
        """Like `find`, for a parameter that is 1 where the recipe says nothing."""
        value = self.find(parameter, tensor, rule, model)
        return 1.0 if value is None else float(value)

    def all_of(
        self, method: str, scope: Scope, tensor: str, rule: Rule | None, model: str | None = None
    ) -> dict[str, Scalar | None]:
        """Every parameter of a method that has a given scope.

        Raises:
            PlanError: one without a default is missing.
        """
        values: dict[str, Scalar | None] = {}
        for name, spec in METHODS[method].parameters.items():
            if spec.scope != scope:
                continue
            value = self.find(name, tensor, rule, model)
            if value is None:
                if spec.required:
                    raise PlanError(f"{method} needs the parameter {name}, which the recipe does not give for {tensor}")
                value = spec.default
            values[name] = int(value) if spec.kind == "integer" and value is not None else value
        return values

    def idle(self) -> list[str]:
        """Parameters of the recipe and its models that none of its methods uses."""
        rules = [rule.merge_method for rule in self.recipe.rules]
        used = {name for method in (self.recipe.merge_method, *rules) for name in _used_by(method)}
        given = [*self.recipe.parameters, *(name for settings in self.of_models.values() for name in settings)]
        return [name for name in dict.fromkeys(given) if name not in used]


def _used_by(method: str) -> Iterable[str]:
    return METHODS["task_arithmetic" if method == "wemoe" else method].parameters
