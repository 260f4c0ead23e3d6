"""Which modules a wemoe rule upscales, and what is stored for each: decided from tensor names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from wemoe_plugin.checkpoints.header import FLOATS
from wemoe_plugin.checkpoints.sources import Source
from wemoe_plugin.errors import PlanError
from wemoe_plugin.recipe.patterns import module_of
from wemoe_plugin.recipe.schema import RouterSpec, Rule, TaskVectorSpec

_FIRST_LAYERS = (
    *("fc1", "c_fc", "gate_proj", "gate_up_proj", "up_proj", "wi", "wi_0", "w1", "w12", "lin1", "dense_h_to_4h"),
    *("q_proj", "q", "query", "q_lin", "qkv", "c_attn"),
)
"""Names of layers that take their module's own input."""

_EMBEDDINGS = ("embed", "wte", "wpe", "relative_attention_bias", "token_type", "shared")


@dataclass(frozen=True)
class UpscaledLayer:
    """A parameter of a Linear layer whose task vectors are kept.

    Attributes:
        tensor: the parameter's name in the checkpoint.
        path: the Linear layer, relative to its module; empty if the module is the layer.
        vectors: name and shape of each tensor stored for it: one for the dense form, A and B for the low-rank form.
        rank: of the low-rank form, at most the smaller side of the weight.
    """

    tensor: str
    path: str
    vectors: tuple[tuple[str, tuple[int, ...]], ...]
    rank: int | None


@dataclass(frozen=True)
class PlannedRouter:
    """A router's shape: ``width`` features in, one weight per expert out."""

    name: str
    width: int
    experts: int
    depth: int

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
        form: of its task vectors, ``dense`` or ``low_rank``.
    """

    path: str
    rule: int
    lambdas: tuple[float, ...]
    router: PlannedRouter
    layers: tuple[UpscaledLayer, ...]
    tensors: tuple[str, ...]
    form: str


def find_upscaled_modules(
    rule: Rule,
    index: int,
    claimed: Mapping[str, str],
    tensors: Mapping[str, Source],
    lambdas: Callable[[str], tuple[float, ...]],
) -> list[UpscaledModule]:
    """The modules of one wemoe rule.

    Args:
        rule: the rule.
        index: its place in the recipe.
        claimed: the tensors it owns, each with the path it was matched by.
        tensors: the base's tensors.
        lambdas: λₖ per expert at a tensor's place in the network.

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
            modules.append(_module(path, names, index, router, form, tensors, lambdas))
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
    values = {name: lambdas(name) for name in names}
    first = values[weights[0]]
    other = next((name for name in names if values[name] != first), None)
    if other is not None:
        raise PlanError(
            f"lambda or weight of {other} is another than that of {weights[0]}; a module has one λ per expert"
        )
    inside = [name for name in tensors if name.startswith(f"{path}.") and _is_linear_weight(name, tensors[name])]
    router = PlannedRouter(
        name=f"rules.{index}" if spec.shared else path,
        width=_input_width(path, inside, tensors),
        experts=len(first),
        depth=spec.depth,
    )
    layers: list[UpscaledLayer] = []
    for weight in weights:
        layer = module_of(weight)
        relative = layer[len(path) + 1 :]
        layers.append(_layer(weight, f"{layer}.weight", relative, tensors[weight].shape, len(first), form.rank))
        bias = f"{layer}.bias"
        if bias in names:
            layers.append(_layer(bias, bias, relative, tensors[bias].shape, len(first), None))
    return UpscaledModule(path, index, first, router, tuple(layers), tuple(names), form.form)


def _is_linear_weight(name: str, tensor: Source) -> bool:
    is_matrix = len(tensor.shape) == 2 and tensor.dtype in FLOATS and name.rpartition(".")[2] == "weight"
    return is_matrix and not any(word in name.rpartition(".")[0].rpartition(".")[2] for word in _EMBEDDINGS)


def _layer(
    tensor: str, parameter: str, path: str, shape: tuple[int, ...], experts: int, rank: int | None
) -> UpscaledLayer:
    if rank is None:
        return UpscaledLayer(tensor, path, ((f"{parameter}.task_vectors", (experts, *shape)),), None)
    out_features, in_features = shape
    rank = min(rank, out_features, in_features)
    factors = (
        (f"{parameter}.task_vectors.A", (experts, rank, in_features)),
        (f"{parameter}.task_vectors.B", (experts, out_features, rank)),
    )
    return UpscaledLayer(tensor, path, factors, rank)


def _input_width(path: str, weights: list[str], tensors: Mapping[str, Source]) -> int:
    """Features of the module's input: known by the name of its first layer, or the same for all its layers."""
    for known in _FIRST_LAYERS:
        for weight in weights:
            if module_of(weight).rpartition(".")[2] == known:
                return tensors[weight].shape[1]
    widths = {tensors[weight].shape[1] for weight in weights}
    if len(widths) > 1:
        layers = ", ".join(module_of(weight).rpartition(".")[2] for weight in weights)
        raise PlanError(f"cannot tell which of the layers {layers} takes the input of the module {path}")
    return widths.pop()
