"""Which models take part in the merge of a tensor, under which method and with which weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from wemoe_plugin.checkpoints.adapter import made_for
from wemoe_plugin.checkpoints.header import FLOATS, SAFETENSORS_DTYPE
from wemoe_plugin.checkpoints.sources import Source
from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.inputs import Inputs, Model
from wemoe_plugin.merging.operations import OutputTensor
from wemoe_plugin.merging.parameters import ParameterReader
from wemoe_plugin.recipe.loading import RecipeFile
from wemoe_plugin.recipe.methods import METHODS, STREAMED
from wemoe_plugin.recipe.schema import Rule


class Participants:
    """The models of a recipe, as its methods see them.

    Attributes:
        recipe: the recipe.
        has_base: whether it names a base.
        base: θ₀, or the first model.
        models: those the recipe lists.
        experts: those of them that are not the base.
        tensors: the base's.
        held: names of tensors that some model has.
        parameters: of methods.
    """

    def __init__(self, source: RecipeFile, inputs: Inputs) -> None:
        self.recipe = source.recipe
        self.has_base = self.recipe.base_model is not None
        self.base, self.models = inputs.base, inputs.models
        self.experts = tuple(m for m in self.models if not (self.has_base and _same(m, self.base)))
        self.tensors = self.base.checkpoint.tensors
        self.held = {name for model in self.models for name in model.checkpoint.tensors}
        self.parameters = ParameterReader(self.recipe, self.tensors)

    def method(self, rule: Rule | None) -> str:
        """A rule's method, or the recipe's for whatever no rule claims."""
        return self.recipe.merge_method if rule is None else rule.merge_method

    def of(self, method: str, rule: Rule | None) -> tuple[Model, ...]:
        """The models a static method sees, in mergekit's order: the base is last where the recipe does not list it.

        For methods to which the base is a model like any other, mergekit takes it in if the recipe's own parameters
        give it all it needs; only the recipe's own method does so here, a rule's sees the models alone.
        """
        if not self.has_base or any(_same(model, self.base) for model in self.models):
            return self.models
        spec = METHODS[method]
        needs_weight = "weight" in spec.parameters and "weight" not in self.recipe.parameters
        if spec.base == "ignored" and (rule is not None or needs_weight):
            return self.models
        return (*self.models, self.base)

    def base_among(self, models: Iterable[Model]) -> int | None:
        """The place of the base, if the recipe names one."""
        return next((i for i, model in enumerate(models) if self.has_base and _same(model, self.base)), None)

    def inputs(self, name: str, models: Iterable[Model]) -> tuple[Source, ...]:
        """A tensor of each of these models."""
        return tuple(model.checkpoint.tensors[name] for model in models)

    def output(self, name: str) -> OutputTensor:
        """A tensor of the ordinary checkpoint, in the dtype that the recipe wants."""
        stored = self.tensors[name]
        wanted = self.recipe.out_dtype or self.recipe.dtype
        dtype = SAFETENSORS_DTYPE[wanted] if wanted is not None and stored.dtype in FLOATS else stored.dtype
        return OutputTensor(name, dtype, stored.shape)

    def weights(self, models: Iterable[Model], tensor_name: str, rule: Rule | None) -> tuple[float, ...]:
        """aₖ of each of these models."""
        return tuple(self.parameters.number("weight", tensor_name, rule, self.name(model)) for model in models)

    def weights_of_vectors(self, tensor_name: str, rule: Rule | None) -> tuple[tuple[float, ...], float]:
        """aₖ of each expert and what task arithmetic divides by; mergekit leaves weights that cancel as they are."""
        weights = self.weights(self.experts, tensor_name, rule)
        total = sum(weights)
        normalize = bool(self.parameters.find("normalize", tensor_name, rule))
        return weights, total if normalize and abs(total) >= 1e-8 else 1.0

    def module_lambdas(self, rule: Rule) -> Callable[[str], tuple[float, ...]]:
        """λₖ per expert of the modules that a wemoe rule upscales, at a tensor's place in the network."""

        def lambdas(tensor_name: str) -> tuple[float, ...]:
            scale = rule.parameters.router.init_lambda if rule.parameters.router else None
            if scale is None:
                scale = self.parameters.number("lambda", tensor_name, None)
            weights, divisor = self.weights_of_vectors(tensor_name, None)
            return tuple(scale * weight / divisor for weight in weights)

        return lambdas

    def name(self, model: Model) -> str | None:
        """Under which the recipe gives a model parameters of its own; the base that it does not list has none."""
        return None if self.has_base and model is self.base else model.name

    def check(self, source: RecipeFile) -> None:
        """Methods that take two models, or three, get as many.

        Raises:
            PlanError: some do not; all of them are named.
        """
        problems = []
        rules = [(("rules", i, "merge_method"), rule) for i, rule in enumerate(self.recipe.rules)]
        for location, rule in [(("merge_method",), None), *rules]:
            method = self.method(rule)
            if method in STREAMED or method == "wemoe":
                continue
            spec, models = METHODS[method], self.of(method, rule)
            others = len(models) - (self.has_base and spec.base != "ignored")
            where = source.where(*location)
            problems += [
                f"{where}: {method} takes {_amount(limits)} {what}; there are {count}"
                for count, limits, what in (
                    (len(models), spec.inputs, "models, the base among them"),
                    (others, spec.others, "models beside the base"),
                )
                if count < limits[0] or (limits[1] is not None and count > limits[1])
            ]
        if problems:
            raise PlanError("\n".join(problems))

    def notes(self) -> Iterable[str]:
        """What a reader of the recipe might not expect."""
        for model in self.models:
            under, adapter = model.checkpoint.path, model.checkpoint.adapter
            named = None if adapter is None else made_for(adapter)
            if named is not None and re.split(r"[/\\]", named.rstrip("/\\"))[-1] not in str(under):
                yield f"{model.name}: its adapter says that it was made for {named}, not for {under}"
        if idle := self.parameters.idle():
            yield f"no method of this recipe uses {', '.join(idle)}; passed over, as mergekit does"
        if self.recipe.merge_method == "linear" and len(self.of("linear", None)) > len(self.models):
            yield "the base is averaged in as well, as in mergekit, since parameters.weight holds for it too"


def _amount(limits: tuple[int, int | None]) -> str:
    fewest, most = limits
    return f"at least {fewest}" if most is None else f"{most}" if fewest == most else f"{fewest} to {most}"


def _same(model: Model, base: Model) -> bool:
    same_path = model.checkpoint.path.resolve() == base.checkpoint.path.resolve()
    return same_path and model.checkpoint.adapter == base.checkpoint.adapter
