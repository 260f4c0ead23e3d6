"""Which modules a wemoe rule upscales, and what is stored for each: decided from tensor names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from wemoe_plugin.checkpoints.header import FLOATS
from wemoe_plugin.checkpoints.sources import Source
from wemoe_plugin.errors import PlanError
from wemoe_plugin.recipe.patterns import first_half, module_of
from wemoe_plugin.recipe.schema import RouterSpec, Rule, TaskVectorSpec

_FIRST_LAYERS = (
    *("fc1", "c_fc", "gate_proj", "gate_up_proj", "up_proj", "wi", "wi_0", "w1", "w12", "lin1", "dense_h_to_4h"),
    *("q_proj", "q", "query", "q_lin", "qkv", "c_attn"),
)
"""Names of layers that take their module's own input."""

_CROSS_ATTENTION = ("EncDecAttention", "crossattention", "encoder_attn")

_EMBEDDINGS = ("embed", "wte", "wpe", "relative_attention_bias", "token_type", "shared")


FormName = Literal["dense", "low_rank", "sparse"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class UpscaledLayer:
    """A parameter of a Linear layer whose task vectors are kept.

    Attributes:
        tensor: the parameter's name in the checkpoint.
        path: the Linear layer, relative to its module; empty if the module is the layer.
        form: of its task vectors; a bias' are always dense.
        vectors: name and shape of each tensor stored for it: one for the dense form, else two parts and the norms.
        sizes: per expert, the rank of the low-rank form or the entries of the sparse one; empty for dense.
    """

    tensor: str
    path: str
    form: FormName
    vectors: tuple[tuple[str, Shape], ...]
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class PlannedRouter:
    """A router's shape: ``width`` features in, one weight per expert out, for each sample or token (``routing``)."""

    name: str
    width: int
    experts: int
    depth: int
    routing: Literal["sample", "token"] = "sample"

    @property
    def parameters(self) -> int:
        hidden = self.width * self.width + self.width if self.depth == 2 else 0
        return hidden + (self.width * self.experts if self.depth else 0) + self.experts


@dataclass(frozen=True)
class UpscaledModule:
    """A module that becomes a weight-ensembling mixture of experts.

    Attributes:
        path: its dotted path in the network.
        rule: the index of the rule that claimed it.
        lambdas: λₖ per expert, for its static merge and its router's initial output.
        router: decides for it, alone or with the other modules of its rule.
        layers: the parameters of its Linear layers.
        tensors: every tensor of the module, its norms among them.
        form: of its weights' task vectors.
        argument: which of its positional arguments the router reads.
    """

    path: str
    rule: int
    lambdas: tuple[float, ...]
    router: PlannedRouter
    layers: tuple[UpscaledLayer, ...]
    tensors: tuple[str, ...]
    form: FormName
    argument: int = 0


def find_upscaled_modules(
    rule: Rule,
    index: int,
    claimed: Mapping[str, str],
    tensors: Mapping[str, Source],
    lambdas: Callable[[str], tuple[float, ...]],
    sizes: Callable[[str], tuple[int, ...]],
    stored_transposed: bool,
) -> list[UpscaledModule]:
    """The modules of one wemoe rule.

    Args:
        rule: the rule.
        index: its place in the recipe.
        claimed: the tensors it owns, each with the path it was matched by.
        tensors: the base's tensors.
        lambdas: λₖ per expert at a tensor's place in the network.
        sizes: per expert, the rank of a weight's task vector, or the entries of it that are kept; see `UpscaledLayer`.
        stored_transposed: whether weights are stored as (in, out).

    Raises:
        PlanError: a module without Linear layers, with fused ones, or whose input width is not clear.
    """
    grouped: dict[str, list[str]] = {}
    problems: list[str] = []
    for name, path in claimed.items():
        if path != name:
            grouped.setdefault(path, []).append(name)
        elif _is_linear_weight(name, tensors[name]) or name.endswith(".bias"):
            grouped.setdefault(module_of(name), []).append(name)
        else:
            problems.append(f"{name} is not the weight of a Linear layer; wemoe needs one")
    router, form = rule.parameters.router or RouterSpec(), rule.parameters.task_vectors or TaskVectorSpec()
    modules: list[UpscaledModule] = []
    for path, names in grouped.items():
        try:
            modules.append(_module(path, names, index, router, form, tensors, lambdas, sizes, stored_transposed))
        except PlanError as error:
            problems.append(str(error))
    if router.shared:
        problems += _sharing_problems(modules)
    if problems:
        shown = problems[:5] + ([f"and {len(problems) - 5} more problems like these"] if len(problems) > 5 else [])
        raise PlanError("\n".join(shown))
    return modules


def _sharing_problems(modules: list[UpscaledModule]) -> list[str]:
    problems = []
    if len(widths := sorted({module.router.width for module in modules})) > 1:
        shown = ", ".join(str(width) for width in widths)
        problems.append(f"one shared router cannot read modules of different widths ({shown}); split the rule")
    if len({module.lambdas for module in modules}) > 1:
        problems.append(
            "one shared router starts at one λ for all its modules, but lambda or weight differs between them (a "
            "gradient, or a filter); split the rule or do not share"
        )
    return problems


def nested_modules(modules: Iterable[UpscaledModule]) -> list[str]:
    """Paths of modules that lie inside another upscaled module, which only one of the two can route."""
    paths = {module.path for module in modules}
    return sorted(path for path in paths if any(path.startswith(f"{other}.") for other in paths))


def _module(
    path: str,
    names: list[str],
    index: int,
    spec: RouterSpec,
    form: TaskVectorSpec,
    tensors: Mapping[str, Source],
    lambdas: Callable[[str], tuple[float, ...]],
    sizes: Callable[[str], tuple[int, ...]],
    stored_transposed: bool,
) -> UpscaledModule:
    fused = [name for name in names if name.endswith("in_proj_weight")]
    fused += [name for name in names if f"{module_of(module_of(name))}.in_proj_weight" in tensors]
    if fused:
        raise PlanError(
            f"{fused[0]} belongs to an nn.MultiheadAttention, which fuses its weights and calls no Linear layer; "
            "leave it to a static method"
        )
    weights = [name for name in names if _is_linear_weight(name, tensors[name])]
    if not weights:
        raise PlanError(f"the module {path} has no Linear layers (no 2-D weight); wemoe needs some")
    for bias in (name for name in names if name.endswith(".bias")):
        weight = f"{module_of(bias)}.weight"
        if weight in tensors and weight not in names and _is_linear_weight(weight, tensors[weight]):
            raise PlanError(
                f"{bias} is upscaled, but {weight}, the weight of its layer, is not; claim both in one rule"
            )
    if spec.routing == "token" and any(word in path.split(".") for word in _CROSS_ATTENTION):
        raise PlanError(f"{path} reads the tokens of two texts; token routing cannot decide for both, use sample")
    values = {name: lambdas(name) for name in names}
    first = values[weights[0]]
    other = next((name for name in names if values[name] != first), None)
    if other is not None:
        raise PlanError(
            f"lambda or weight of {other} is another than that of {weights[0]}; a module has one λ per expert"
        )
    half = first_half(path, tensors)
    decider = path if half is None else half
    inside = [name for name in tensors if name.startswith(f"{decider}.") and _is_linear_weight(name, tensors[name])]
    router = PlannedRouter(
        name=f"rules.{index}" if spec.shared else decider,
        width=_input_width(decider, inside, tensors, 0 if stored_transposed else 1),
        experts=len(first),
        depth=spec.depth,
        routing=spec.routing,
    )
    layers: list[UpscaledLayer] = []
    for weight in weights:
        layer = module_of(weight)
        relative = layer[len(path) + 1 :]
        kept = f"{layer}.weight.task_vectors"
        chosen = () if form.form == "dense" else sizes(weight)
        vectors = vectors_to_store(kept, form.form, tensors[weight].shape, len(first), chosen)
        layers.append(UpscaledLayer(weight, relative, form.form, vectors, chosen))
        bias = f"{layer}.bias"
        if bias in names:
            vectors = vectors_to_store(f"{bias}.task_vectors", "dense", tensors[bias].shape, len(first), ())
            layers.append(UpscaledLayer(bias, relative, "dense", vectors))
    argument = 0 if half is None else 1
    return UpscaledModule(path, index, first, router, tuple(layers), tuple(names), form.form, argument)


def vectors_to_store(
    name: str, form: FormName, shape: Shape, experts: int, sizes: tuple[int, ...]
) -> tuple[tuple[str, Shape], ...]:
    """Name and shape of what is stored for a parameter's task vectors.

    Args:
        name: of the dense form's tensor; those of other forms begin with it.
        form: dense, low_rank or sparse.
        shape: of the parameter as it is stored.
        experts: how many there are.
        sizes: per expert, its rank or its entries.
    """
    if form == "dense":
        return ((name, (experts, *shape)),)
    norms = (f"{name}.norms", (experts, 2))
    if form == "sparse":
        return (f"{name}.values", (experts, sizes[0])), (f"{name}.indices", (experts, sizes[0])), norms
    rows, columns = shape
    return (f"{name}.down", (sum(sizes), columns)), (f"{name}.up", (sum(sizes), rows)), norms


def _is_linear_weight(name: str, tensor: Source) -> bool:
    is_matrix = len(tensor.shape) == 2 and tensor.dtype in FLOATS and name.rpartition(".")[2] == "weight"
    return is_matrix and not any(word in name.rpartition(".")[0].rpartition(".")[2] for word in _EMBEDDINGS)


def _input_width(path: str, weights: list[str], tensors: Mapping[str, Source], axis: int) -> int:
    """Features of the module's input: known by the name of its first layer, or the same for all its layers."""
    for known in _FIRST_LAYERS:
        for weight in weights:
            if module_of(weight).rpartition(".")[2] == known:
                return tensors[weight].shape[axis]
    widths = {tensors[weight].shape[axis] for weight in weights}
    if len(widths) > 1:
        layers = ", ".join(module_of(weight).rpartition(".")[2] for weight in weights)
        raise PlanError(f"cannot tell which of the layers {layers} takes the input of the module {path}")
    return widths.pop()
