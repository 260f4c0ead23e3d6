"""The plan: every output tensor and how it is made, fixed from the recipe and the headers alone.

All checks live here, so that nothing is written for an input that does not fit. No tensor is read and torch is not
imported.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wemoe_plugin.checkpoints.checkpoint import WEIGHT_NAMES
from wemoe_plugin.checkpoints.conv1d import stores_transposed
from wemoe_plugin.checkpoints.header import FLOATS, SAFETENSORS_DTYPE
from wemoe_plugin.checkpoints.ranges import FileStamp, stamp_files
from wemoe_plugin.checkpoints.sources import AdaptedTensor, Source, is_change_of, is_same
from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.inputs import Inputs, Model, open_models
from wemoe_plugin.merging.layout import OutputFile, lay_out
from wemoe_plugin.merging.names import nearest_modules
from wemoe_plugin.merging.operations import Combine, Compress, Copy, Delegate, Mixture, Operation, OutputTensor, Upscale
from wemoe_plugin.merging.parameters import ParameterReader
from wemoe_plugin.merging.tied import Twins
from wemoe_plugin.merging.upscaling import (
    PlannedRouter,
    UpscaledLayer,
    UpscaledModule,
    find_upscaled_modules,
    nested_modules,
)
from wemoe_plugin.recipe.loading import RecipeFile
from wemoe_plugin.recipe.methods import METHODS, STREAMED
from wemoe_plugin.recipe.patterns import KEYWORDS
from wemoe_plugin.recipe.schema import Rule, TaskVectorSpec

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Claim:
    """What one rule (or the default) takes: for the plan's table."""

    label: str
    method: str
    tensors: int
    parameters: int
    modules: int


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do.

    Attributes:
        base: θ₀; for a recipe without base_model, the first model, which then only lends its configuration.
        experts: the models whose task vectors are taken, in the recipe's order.
        dtype: of the arithmetic on ranges, a safetensors name; never less than float32.
        operations: one per tensor of the ordinary checkpoint; after those whose task vectors are compressed, one per
            expert for that.
        static_files: the ordinary checkpoint.
        vector_files: the task vectors of the upscaled modules; empty if no rule upscales.
        modules: the upscaled modules.
        claims: what each rule and the default took.
        base_only: tensors that no expert has and that are copied from the base.
        notes: what a reader of the recipe might not expect.
        twins: tensors that must be equal to each other; compared before anything is merged.
        stamps: every file that is read, as it was when the plan was made.
        seed: of the methods that draw numbers, and of the routers.
        shard_bytes: the largest file to write.
        open_ranks: what will decide about ranks once `wemoe_plugin.merging.survey.settle` sees the singular values:
            ``energy``, whose ranks are upper bounds until then, and ``max_parameters``, whose ranks are an even share.
    """

    base: Model
    experts: tuple[Model, ...]
    dtype: str
    operations: tuple[Operation, ...]
    static_files: tuple[OutputFile, ...]
    vector_files: tuple[OutputFile, ...]
    modules: tuple[UpscaledModule, ...]
    claims: tuple[Claim, ...]
    base_only: tuple[str, ...]
    notes: tuple[str, ...]
    twins: tuple[Twins, ...]
    stamps: Mapping[Path, FileStamp]
    seed: int
    shard_bytes: int | None
    open_ranks: tuple[str, ...]

    @property
    def settled(self) -> bool:
        """Whether all ranks are known."""
        return not self.open_ranks

    @property
    def library(self) -> str:
        return self.base.checkpoint.library or "transformers"

    @property
    def files(self) -> tuple[OutputFile, ...]:
        return self.static_files + self.vector_files

    @property
    def bytes_read(self) -> int:
        return sum(source.nbytes for operation in self.operations for source in operation.sources)

    @property
    def bytes_written(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def base_parameters(self) -> int:
        return sum(tensor.elements for tensor in self.base.checkpoint.tensors.values())

    @property
    def vector_parameters(self) -> int:
        return sum(
            tensor.elements for file in self.vector_files for tensor in file.tensors if is_parameter(tensor.name)
        )

    @property
    def router_parameters(self) -> int:
        return sum(router.parameters for router in {m.router.name: m.router for m in self.modules}.values())


def is_parameter(vector_name: str) -> bool:
    """Whether what is stored for task vectors takes part in the arithmetic: positions and norms do not."""
    return not vector_name.endswith((".indices", ".norms"))


def no_room(source: RecipeFile, multiple: float, parameters: int, base_parameters: int) -> PlanError:
    """A limit on parameters below what ranks of one take."""
    rule = next(i for i, r in enumerate(source.recipe.rules) if (s := r.parameters.task_vectors) and s.max_parameters)
    where = source.where("rules", rule, "parameters", "task_vectors", "max_parameters")
    return PlanError(
        f"{where}: max_parameters: {multiple:g}x leaves no room: base, routers and task vectors of rank one are "
        f"{parameters / base_parameters:.3f}x already; shared or shallower routers are smaller"
    )


Ranks = Mapping[str, tuple[int, ...]]
"""By the name of a weight: the rank of each expert's task vector."""


def plan_merge(
    source: RecipeFile,
    shard_bytes: int | None = DEFAULT_SHARD_BYTES,
    seed: int | None = None,
    ranks: Ranks | None = None,
) -> MergePlan:
    """Plan a recipe.

    Args:
        source: the recipe.
        shard_bytes: the largest weights file to write; open_clip's weights always stay in one file.
        seed: of the methods that draw numbers and of the routers; default the recipe's ``tuning.seed``, else 0.
        ranks: where they depend on singular values and have been chosen.

    Raises:
        CheckpointError: a model cannot be read.
        PlanError: the models do not fit together, or a rule does not fit them; all such problems at once.
    """
    inputs = open_models(source)
    if seed is None:
        seed = source.recipe.tuning.seed if source.recipe.tuning else 0
    return _Planner(source, inputs, shard_bytes, seed, ranks).plan()


class _Planner:
    """Walks over the base's tensors once and decides on each."""

    def __init__(
        self, source: RecipeFile, inputs: Inputs, shard_bytes: int | None, seed: int, ranks: Ranks | None
    ) -> None:
        self.source = source
        self.recipe = source.recipe
        self.inputs = inputs
        base = self.base = inputs.base
        experts = self.models = inputs.models
        self.shard_bytes = shard_bytes
        self.seed = seed
        self.ranks = ranks
        self.even_rank = 1
        self.tensors = base.checkpoint.tensors
        self.held = {name for model in experts for name in model.checkpoint.tensors}
        self.experts = tuple(m for m in experts if self.recipe.base_model is None or not _same(m, base))
        self.has_base = self.recipe.base_model is not None
        self.parameters = ParameterReader(self.recipe, self.tensors)

    def plan(self) -> MergePlan:
        self._check_participants()
        owners, paths = self.owners, _ = self._claim()
        modules = self._upscale(owners, paths)
        open_ranks = tuple(sorted({kind for module in modules if (kind := self._form(module).open_rank)}))
        if self.ranks is None and "max_parameters" in open_ranks:
            self.even_rank = self._even_rank(modules)
            modules = self._upscale(owners, paths)
        layers = {layer.tensor: (module, layer) for module in modules for layer in module.layers}
        in_module = {name: module for module in modules for name in module.tensors}
        operations: list[Operation] = []
        for name in self.tensors:
            rule = owners.get(name)
            if name in layers:
                operations += self._upscaled(name, *layers[name])
            else:
                operations.append(self._static(name, rule, in_module.get(name)))
        static = [o.output for o in operations if not isinstance(o, Compress)]
        kept = {vector.name: vector for operation in operations for vector in _vectors(operation)}
        sources = [source for operation in operations for source in operation.sources]
        sources += [source for pair in self.inputs.twins for source in (pair.kept, pair.dropped)]
        library = self.base.checkpoint.library or "transformers"
        limit = self.shard_bytes if library == "transformers" else None
        return MergePlan(
            base=self.base,
            experts=self.experts,
            dtype="F64" if self.recipe.dtype == "float64" else "F32",
            operations=tuple(operations),
            static_files=lay_out(WEIGHT_NAMES[library], static, limit),
            vector_files=lay_out("wemoe", kept.values(), self.shard_bytes) if kept else (),
            modules=modules,
            claims=tuple(self._table(owners, modules)),
            base_only=tuple(name for name in self.tensors if name not in self.held),
            notes=tuple(self._notes()),
            twins=self.inputs.twins,
            stamps=stamp_files(sorted({file for source in sources for file in source.files})),
            seed=self.seed,
            shard_bytes=self.shard_bytes,
            open_ranks=open_ranks if self.ranks is None else (),
        )

    def _claim(self) -> tuple[dict[str, int], dict[str, str]]:
        """The index of the rule that owns each tensor, and the path it was matched by."""
        owners: dict[str, int] = {}
        paths: dict[str, str] = {}
        problems = []
        for i, rule in enumerate(self.recipe.rules):
            found = rule.match.claims(self.tensors)
            free = {name: path for name, path in found.items() if name not in owners}
            where = self.source.where("rules", i, "match")
            if not found:
                near = nearest_modules(rule.match.globs, self.tensors)
                hint = f"\n    nearest: {near}" if near else ""
                if any(glob in KEYWORDS for glob in rule.match.globs):
                    hint = "\n    no module holds just the layers of a known family; name its modules with a glob"
                base = self.base.checkpoint.path
                problems.append(f"{where}: rules[{i}].match {str(rule.match)!r} matches no tensor of {base}{hint}")
            elif not free:
                problems.append(f"{where}: rules[{i}].match {str(rule.match)!r} matches only what earlier rules claim")
            for name, path in free.items():
                owners[name], paths[name] = i, path
        if problems:
            raise PlanError("\n".join(problems))
        return owners, paths

    def _upscale(self, owners: Mapping[str, int], paths: Mapping[str, str]) -> tuple[UpscaledModule, ...]:
        modules: list[UpscaledModule] = []
        problems: list[str] = []
        if not self.experts and any(rule.merge_method == "wemoe" for rule in self.recipe.rules):
            raise PlanError(f"{self.source.where('models')}: every model is the base; wemoe needs an expert")
        for i, rule in enumerate(self.recipe.rules):
            if rule.merge_method != "wemoe":
                continue
            claimed = {name: paths[name] for name, owner in owners.items() if owner == i}
            tuned = {name: path for name, path in claimed.items() if name in self.held}
            where = self.source.where("rules", i)
            if not tuned:
                problems.append(
                    f"{where}: rules[{i}] matches only tensors that no expert has; they have no task vectors"
                )
                continue
            try:
                modules += find_upscaled_modules(
                    rule,
                    i,
                    tuned,
                    self.tensors,
                    self._module_lambdas(rule),
                    self._sizes(rule),
                    stores_transposed(self.base.checkpoint.config),
                )
            except PlanError as error:
                problems += [f"{where}: rules[{i}]: {line}" for line in str(error).splitlines()]
        specs: dict[str, PlannedRouter] = {}
        problems += [
            f"{module.path} and another module share the router of {module.router.name}, but their rules want "
            "different ones; match them in one rule"
            for module in modules
            if specs.setdefault(module.router.name, module.router) != module.router
        ]
        problems += [f"{path} lies inside another upscaled module; upscale one" for path in nested_modules(modules)]
        if problems:
            raise PlanError("\n".join(problems))
        return tuple(modules)

    def _module_lambdas(self, rule: Rule) -> Callable[[str], tuple[float, ...]]:
        def lambdas(tensor_name: str) -> tuple[float, ...]:
            scale = rule.parameters.router.init_lambda if rule.parameters.router else None
            if scale is None:
                scale = self.parameters.number("lambda", tensor_name, None)
            weights = self._weights(self.experts, tensor_name, None)
            divisor = _divisor(weights, bool(self.parameters.find("normalize", tensor_name, None)))
            return tuple(scale * weight / divisor for weight in weights)

        return lambdas

    def _sizes(self, rule: Rule) -> Callable[[str], tuple[int, ...]]:
        """Per expert, the rank of a weight's task vector or the entries of it that are kept."""
        spec = rule.parameters.task_vectors or TaskVectorSpec()

        def sizes(tensor_name: str) -> tuple[int, ...]:
            base = self.tensors[tensor_name]
            experts = self._inputs(tensor_name, self.experts)
            if spec.density is not None:
                if base.elements >= 2**31:
                    raise PlanError(
                        f"{tensor_name} has too many elements for the sparse form, whose places have 32 bits"
                    )
                return (max(1, round(spec.density * base.elements)),) * len(experts)
            if self.ranks is not None and tensor_name in self.ranks:
                return self.ranks[tensor_name]
            most = spec.rank or (self.even_rank if spec.max_parameters else min(base.shape))
            ranks = tuple(min(most, highest_rank(expert, base)) for expert in experts)
            return ranks if any(ranks) else (1, *ranks[1:])

        return sizes

    def _even_rank(self, modules: Iterable[UpscaledModule]) -> int:
        """The rank within ``max_parameters`` were it the same for all tensors and experts the limit is for.

        Raises:
            PlanError: there is no room for a rank of one.
        """
        base = sum(tensor.elements for tensor in self.tensors.values())
        least = base + sum(router.parameters for router in {m.router.name: m.router for m in modules}.values())
        limit, each = 0.0, 0
        for module in modules:
            spec = self._form(module)
            for layer in module.layers:
                if spec.open_rank is None or layer.form == "dense":
                    least += sum(math.prod(shape) for name, shape in layer.vectors if is_parameter(name))
                    continue
                rank_one = sum(map(bool, layer.sizes)) * sum(self.tensors[layer.tensor].shape)
                least += rank_one
                if spec.max_parameters is not None:
                    limit, each = spec.max_parameters, each + rank_one
        room = int(limit * base) - least
        if room < 0:
            raise no_room(self.source, limit, least, base)
        return 1 + room // each

    def _form(self, module: UpscaledModule) -> TaskVectorSpec:
        return self.recipe.rules[module.rule].parameters.task_vectors or TaskVectorSpec()

    def _upscaled(self, name: str, module: UpscaledModule, layer: UpscaledLayer) -> list[Operation]:
        output, base, experts = self._output(name), self.tensors[name], self._inputs(name, self.experts)
        mixture = Mixture(base, experts, module.lambdas)
        if layer.form == "dense":
            ((vector, shape),) = layer.vectors
            return [Upscale(output, mixture, OutputTensor(vector, output.dtype, shape))]
        (first, one), (second, other), (norm, two) = layer.vectors
        parts = (
            OutputTensor(first, output.dtype, one),
            OutputTensor(second, "I32" if layer.form == "sparse" else output.dtype, other),
        )
        norms = OutputTensor(norm, "F32", two)
        operations: list[Operation] = [Combine(output, mixture)]
        before = 0
        for k, (expert, size) in enumerate(zip(experts, layer.sizes, strict=True)):
            starts = (before, before)
            if layer.form == "low_rank":
                starts = before * one[1], before * other[1]
            if size:
                operations.append(Compress(output, base, expert, layer.form, size, parts, starts, norms, k))
            before += size
        return operations

    def _static(self, name: str, rule_index: int | None, module: UpscaledModule | None) -> Operation:
        rule = None if rule_index is None else self.recipe.rules[rule_index]
        output, base = self._output(name), self.tensors[name]
        method = self.recipe.merge_method if rule is None else rule.merge_method
        if method == "base" or name not in self.held:
            return Copy(output, base)
        if base.dtype not in FLOATS:
            return Copy(output, base, self._inputs(name, self.models))
        if module is not None:
            return Combine(output, Mixture(base, self._inputs(name, self.experts), module.lambdas))
        if method == "linear":
            return self._averaged(output, rule)
        if method == "task_arithmetic":
            return self._added(output, rule)
        return self._delegated(output, method, rule)

    def _averaged(self, output: OutputTensor, rule: Rule | None) -> Combine:
        models = self._participants("linear", rule)
        weights = self._weights(models, output.name, rule)
        normalize = self.parameters.find("normalize", output.name, rule)
        divisor = sum(weights) if normalize in (None, True) else 1.0
        if abs(divisor) < 1e-8:
            raise PlanError(f"{output.name}: the weights of the models add up to 0; linear cannot normalize them")
        return Combine(output, Mixture(None, self._inputs(output.name, models), weights, divisor))

    def _added(self, output: OutputTensor, rule: Rule | None) -> Combine | Copy:
        base = self.tensors[output.name]
        if not self.experts:
            return Copy(output, base)
        weights = self._weights(self.experts, output.name, rule)
        divisor = _divisor(weights, bool(self.parameters.find("normalize", output.name, rule)))
        scale = self.parameters.number("lambda", output.name, rule)
        return Combine(output, Mixture(base, self._inputs(output.name, self.experts), weights, divisor, scale))

    def _delegated(self, output: OutputTensor, method: str, rule: Rule | None) -> Delegate:
        models = self._participants(method, rule)
        base = next((i for i, model in enumerate(models) if self.has_base and _same(model, self.base)), None)
        spec = METHODS[method]
        return Delegate(
            output,
            method,
            SAFETENSORS_DTYPE[self.recipe.dtype or "float32"],
            self._inputs(output.name, models),
            None if spec.base == "ignored" else base,
            {k: v for k, v in self.parameters.all_of(method, "all", output.name, rule).items() if v is not None},
            tuple(self.parameters.all_of(method, "model", output.name, rule, self._name(model)) for model in models),
            _tensor_seed(self.seed, output.name) if spec.random else None,
        )

    def _participants(self, method: str, rule: Rule | None) -> tuple[Model, ...]:
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

    def _check_participants(self) -> None:
        """Methods that take two models, or three, get as many."""
        problems = []
        rules = [(("rules", i, "merge_method"), rule) for i, rule in enumerate(self.recipe.rules)]
        for location, rule in [(("merge_method",), None), *rules]:
            method = self.recipe.merge_method if rule is None else rule.merge_method
            if method in STREAMED or method == "wemoe":
                continue
            spec, models = METHODS[method], self._participants(method, rule)
            others = len(models) - (self.has_base and spec.base != "ignored")
            where = self.source.where(*location)
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

    def _inputs(self, name: str, models: Iterable[Model]) -> tuple[Source, ...]:
        return tuple(model.checkpoint.tensors[name] for model in models)

    def _output(self, name: str) -> OutputTensor:
        stored = self.tensors[name]
        wanted = self.recipe.out_dtype or self.recipe.dtype
        dtype = SAFETENSORS_DTYPE[wanted] if wanted is not None and stored.dtype in FLOATS else stored.dtype
        return OutputTensor(name, dtype, stored.shape)

    def _weights(self, models: Iterable[Model], tensor_name: str, rule: Rule | None) -> tuple[float, ...]:
        return tuple(self.parameters.number("weight", tensor_name, rule, self._name(model)) for model in models)

    def _name(self, model: Model) -> str | None:
        """Under which the recipe gives a model parameters of its own; the base that it does not list has none."""
        return None if self.has_base and model is self.base else model.name

    def _notes(self) -> Iterable[str]:
        yield from self.inputs.notes
        if idle := self.parameters.idle():
            yield f"no method of this recipe uses {', '.join(idle)}; passed over, as mergekit does"
        if self.recipe.merge_method == "linear" and len(self._participants("linear", None)) > len(self.models):
            yield "the base is averaged in as well, as in mergekit, since parameters.weight holds for it too"

    def _table(self, owners: Mapping[str, int], modules: tuple[UpscaledModule, ...]) -> Iterable[Claim]:
        for i in (*range(len(self.recipe.rules)), None):
            names = [name for name in self.tensors if owners.get(name) == i]
            if i is None and not names:
                continue
            rule = None if i is None else self.recipe.rules[i]
            yield Claim(
                label="everything else" if rule is None else str(rule.match),
                method=self.recipe.merge_method if rule is None else rule.merge_method,
                tensors=len(names),
                parameters=sum(self.tensors[name].elements for name in names),
                modules=sum(module.rule == i for module in modules),
            )


def highest_rank(expert: Source, base: Source) -> int:
    """The rank that an expert's task vector can have, as far as it can be told without reading it."""
    if is_same(expert, base):
        return 0
    own = expert.down.shape[0] if isinstance(expert, AdaptedTensor) and is_change_of(expert, base) else min(base.shape)
    return min(own, *base.shape)


def _vectors(operation: Operation) -> tuple[OutputTensor, ...]:
    if isinstance(operation, Upscale):
        return (operation.vectors,)
    return operation.written if isinstance(operation, Compress) else ()


def _amount(limits: tuple[int, int | None]) -> str:
    fewest, most = limits
    return f"at least {fewest}" if most is None else f"{most}" if fewest == most else f"{fewest} to {most}"


def _tensor_seed(seed: int, name: str) -> int:
    """A seed of each tensor's own, so that neither threads nor their order change what a method draws for it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def _divisor(weights: tuple[float, ...], normalize: bool) -> float:
    """What task arithmetic divides by; mergekit leaves weights that cancel as they are."""
    total = sum(weights)
    return total if normalize and abs(total) >= 1e-8 else 1.0


def _same(model: Model, base: Model) -> bool:
    same_path = model.checkpoint.path.resolve() == base.checkpoint.path.resolve()
    return same_path and model.checkpoint.adapter == base.checkpoint.adapter
