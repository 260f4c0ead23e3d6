"""Plan a recipe from its text and the headers of its models alone.

All checks live here, so that nothing is written for an input that does not fit. No tensor is read and torch is not
imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from wemoe_plugin.checkpoints.checkpoint import WEIGHT_NAMES
from wemoe_plugin.checkpoints.conv1d import stores_transposed
from wemoe_plugin.checkpoints.header import FLOATS
from wemoe_plugin.checkpoints.ranges import stamp_files
from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.inputs import open_models
from wemoe_plugin.merging.layout import lay_out
from wemoe_plugin.merging.names import nearest_modules
from wemoe_plugin.merging.operations import Combine, Compress, Mixture, Operation, OutputTensor, Upscale
from wemoe_plugin.merging.participants import Participants
from wemoe_plugin.merging.plan import Claim, MergePlan
from wemoe_plugin.merging.sizes import Ranks, Sizes, even_rank, task_vectors_of
from wemoe_plugin.merging.static import static_operation
from wemoe_plugin.merging.upscaling import (
    PlannedRouter,
    UpscaledLayer,
    UpscaledModule,
    find_upscaled_modules,
    nested_modules,
)
from wemoe_plugin.recipe.loading import RecipeFile
from wemoe_plugin.recipe.patterns import KEYWORDS
from wemoe_plugin.recipe.schema import TaskVectorSpec

DEFAULT_SHARD_BYTES = 5_000_000_000


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
    if seed is None:
        seed = source.recipe.tuning.seed if source.recipe.tuning else 0
    inputs = open_models(source)
    taking_part = Participants(source, inputs)
    taking_part.check(source)
    owners, paths = _claim(source, taking_part)
    modules = _upscale(source, taking_part, owners, paths, Sizes(ranks))
    specs = {task_vectors_of(source.recipe, module) for module in modules}
    open_ranks = tuple(sorted({spec.open_rank for spec in specs if spec.open_rank})) if ranks is None else ()
    if "max_parameters" in open_ranks:
        shared = Sizes(even_rank=even_rank(source, taking_part.tensors, modules))
        modules = _upscale(source, taking_part, owners, paths, shared)
    operations = tuple(_operations(source, taking_part, owners, modules, seed))
    static = [operation.output for operation in operations if not isinstance(operation, Compress)]
    kept = {vector.name: vector for operation in operations for vector in _vectors(operation)}
    sources = [read for operation in operations for read in operation.sources]
    sources += [read for pair in inputs.twins for read in (pair.kept, pair.dropped)]
    library = inputs.base.checkpoint.library or "transformers"
    return MergePlan(
        base=inputs.base,
        experts=taking_part.experts,
        dtype="F64" if source.recipe.dtype == "float64" else "F32",
        operations=operations,
        static_files=lay_out(WEIGHT_NAMES[library], static, shard_bytes if library == "transformers" else None),
        vector_files=lay_out("wemoe", kept.values(), shard_bytes) if kept else (),
        modules=modules,
        claims=tuple(_table(taking_part, owners, modules)),
        base_only=tuple(name for name in taking_part.tensors if name not in taking_part.held),
        notes=(*inputs.notes, *taking_part.notes()),
        twins=inputs.twins,
        stamps=stamp_files(sorted({file for read in sources for file in read.files})),
        seed=seed,
        shard_bytes=shard_bytes,
        open_ranks=open_ranks,
    )


def _claim(source: RecipeFile, taking_part: Participants) -> tuple[dict[str, int], dict[str, str]]:
    """The index of the rule that owns each tensor, and the path it was matched by."""
    owners: dict[str, int] = {}
    paths: dict[str, str] = {}
    problems = []
    for i, rule in enumerate(source.recipe.rules):
        found = rule.match.claims(taking_part.tensors)
        free = {name: path for name, path in found.items() if name not in owners}
        where = source.where("rules", i, "match")
        if not found:
            near = nearest_modules(rule.match.globs, taking_part.tensors)
            hint = f"\n    nearest: {near}" if near else ""
            if any(glob in KEYWORDS for glob in rule.match.globs):
                hint = "\n    no module holds just the layers of a known family; name its modules with a glob"
            base = taking_part.base.checkpoint.path
            problems.append(f"{where}: rules[{i}].match {str(rule.match)!r} matches no tensor of {base}{hint}")
        elif not free:
            problems.append(f"{where}: rules[{i}].match {str(rule.match)!r} matches only what earlier rules claim")
        for name, path in free.items():
            owners[name], paths[name] = i, path
    if problems:
        raise PlanError("\n".join(problems))
    return owners, paths


def _upscale(
    source: RecipeFile,
    taking_part: Participants,
    owners: Mapping[str, int],
    paths: Mapping[str, str],
    known: Sizes,
) -> tuple[UpscaledModule, ...]:
    """The modules of all wemoe rules."""
    rules = [(i, rule) for i, rule in enumerate(source.recipe.rules) if rule.merge_method == "wemoe"]
    if rules and not taking_part.experts:
        raise PlanError(f"{source.where('models')}: every model is the base; wemoe needs an expert")
    modules: list[UpscaledModule] = []
    problems: list[str] = []
    for i, rule in rules:
        where = source.where("rules", i)
        tuned = {name: paths[name] for name, owner in owners.items() if owner == i and name in taking_part.held}
        if not tuned:
            problems.append(f"{where}: rules[{i}] matches only tensors that no expert has; they have no task vectors")
            continue
        spec = rule.parameters.task_vectors or TaskVectorSpec()

        def sizes(name: str, spec: TaskVectorSpec = spec) -> tuple[int, ...]:
            return known.of(spec, name, taking_part.tensors[name], taking_part.inputs(name, taking_part.experts))

        try:
            modules += find_upscaled_modules(
                rule,
                i,
                tuned,
                taking_part.tensors,
                taking_part.module_lambdas(rule),
                sizes,
                stores_transposed(taking_part.base.checkpoint.config),
            )
        except PlanError as error:
            problems += [f"{where}: rules[{i}]: {line}" for line in str(error).splitlines()]
    routers: dict[str, PlannedRouter] = {}
    problems += [
        f"{module.path} and another module share the router of {module.router.name}, but their rules want "
        "different ones; match them in one rule"
        for module in modules
        if routers.setdefault(module.router.name, module.router) != module.router
    ]
    problems += [f"{path} lies inside another upscaled module; upscale one" for path in nested_modules(modules)]
    if problems:
        raise PlanError("\n".join(problems))
    return tuple(modules)


def _operations(
    source: RecipeFile,
    taking_part: Participants,
    owners: Mapping[str, int],
    modules: tuple[UpscaledModule, ...],
    seed: int,
) -> Iterable[Operation]:
    """One per tensor of the base, in its order; after a tensor whose task vectors are compressed, those that do."""
    layers = {layer.tensor: (module, layer) for module in modules for layer in module.layers}
    lambdas = {name: module.lambdas for module in modules for name in module.tensors}
    for name, base in taking_part.tensors.items():
        experts, output = taking_part.experts, taking_part.output(name)
        if name in layers:
            module, layer = layers[name]
            mixture = Mixture(base, taking_part.inputs(name, experts), module.lambdas)
            yield from _upscaled(output, mixture, layer)
        elif name in lambdas and name in taking_part.held and base.dtype in FLOATS:
            yield Combine(output, Mixture(base, taking_part.inputs(name, experts), lambdas[name]))
        else:
            rule = owners.get(name)
            yield static_operation(taking_part, name, None if rule is None else source.recipe.rules[rule], seed)


def _upscaled(output: OutputTensor, mixture: Mixture, layer: UpscaledLayer) -> Iterable[Operation]:
    """Merge a parameter of an upscaled layer and keep its task vectors."""
    if layer.form == "dense":
        ((vector, shape),) = layer.vectors
        yield Upscale(output, mixture, OutputTensor(vector, output.dtype, shape))
        return
    (first, one), (second, other), (norm, two) = layer.vectors
    parts = (
        OutputTensor(first, output.dtype, one),
        OutputTensor(second, "I32" if layer.form == "sparse" else output.dtype, other),
    )
    norms = OutputTensor(norm, "F32", two)
    assert mixture.base is not None
    yield Combine(output, mixture)
    before = 0
    for k, (expert, size) in enumerate(zip(mixture.inputs, layer.sizes, strict=True)):
        starts = (before, before)
        if layer.form == "low_rank":
            starts = before * one[1], before * other[1]
        if size:
            yield Compress(output, mixture.base, expert, layer.form, size, parts, starts, norms, k)
        before += size


def _vectors(operation: Operation) -> tuple[OutputTensor, ...]:
    if isinstance(operation, Upscale):
        return (operation.vectors,)
    return operation.written if isinstance(operation, Compress) else ()


def _table(
    taking_part: Participants, owners: Mapping[str, int], modules: tuple[UpscaledModule, ...]
) -> Iterable[Claim]:
    """What each rule took, and then the recipe's own method, if it took anything."""
    rules = taking_part.recipe.rules
    for i in (*range(len(rules)), None):
        names = [name for name in taking_part.tensors if owners.get(name) == i]
        if i is None and not names:
            continue
        rule = None if i is None else rules[i]
        yield Claim(
            label="everything else" if rule is None else str(rule.match),
            method=taking_part.method(rule),
            tensors=len(names),
            parameters=sum(taking_part.tensors[name].elements for name in names),
            modules=sum(module.rule == i for module in modules),
        )
