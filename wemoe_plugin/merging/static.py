"""The operation that makes a tensor of the ordinary checkpoint by a static method."""

from __future__ import annotations

import hashlib

from wemoe_plugin.checkpoints.header import FLOATS, SAFETENSORS_DTYPE
from wemoe_plugin.errors import PlanError
from wemoe_plugin.merging.operations import Combine, Copy, Delegate, Mixture, Operation, OutputTensor
from wemoe_plugin.merging.participants import Participants
from wemoe_plugin.recipe.methods import METHODS
from wemoe_plugin.recipe.schema import Rule


def static_operation(taking_part: Participants, name: str, rule: Rule | None, seed: int) -> Operation:
    """Merge one tensor by its rule's method, or by the recipe's.

    Args:
        taking_part: the models.
        name: of the tensor.
        rule: that claims it, if one does.
        seed: of methods that draw numbers.

    Raises:
        PlanError: a parameter of the method is missing, or does not go with this tensor.
    """
    output, base = taking_part.output(name), taking_part.tensors[name]
    method = taking_part.method(rule)
    if method == "base" or name not in taking_part.held:
        return Copy(output, base)
    if base.dtype not in FLOATS:
        return Copy(output, base, taking_part.inputs(name, taking_part.models))
    if method == "linear":
        return _averaged(taking_part, output, rule)
    if method == "task_arithmetic":
        return _added(taking_part, output, rule)
    return _delegated(taking_part, output, method, rule, seed)


def _averaged(taking_part: Participants, output: OutputTensor, rule: Rule | None) -> Combine:
    models = taking_part.of("linear", rule)
    weights = taking_part.weights(models, output.name, rule)
    normalize = taking_part.parameters.find("normalize", output.name, rule)
    divisor = sum(weights) if normalize in (None, True) else 1.0
    if abs(divisor) < 1e-8:
        raise PlanError(f"{output.name}: the weights of the models add up to 0; linear cannot normalize them")
    return Combine(output, Mixture(None, taking_part.inputs(output.name, models), weights, divisor))


def _added(taking_part: Participants, output: OutputTensor, rule: Rule | None) -> Combine | Copy:
    base = taking_part.tensors[output.name]
    if not taking_part.experts:
        return Copy(output, base)
    weights, divisor = taking_part.weights_of_vectors(output.name, rule)
    scale = taking_part.parameters.number("lambda", output.name, rule)
    experts = taking_part.inputs(output.name, taking_part.experts)
    return Combine(output, Mixture(base, experts, weights, divisor, scale))


def _delegated(taking_part: Participants, output: OutputTensor, method: str, rule: Rule | None, seed: int) -> Delegate:
    models, spec, parameters = taking_part.of(method, rule), METHODS[method], taking_part.parameters
    return Delegate(
        output,
        method,
        SAFETENSORS_DTYPE[taking_part.recipe.dtype or "float32"],
        taking_part.inputs(output.name, models),
        None if spec.base == "ignored" else taking_part.base_among(models),
        {k: v for k, v in parameters.all_of(method, "all", output.name, rule).items() if v is not None},
        tuple(parameters.all_of(method, "model", output.name, rule, taking_part.name(model)) for model in models),
        _tensor_seed(seed, output.name) if spec.random else None,
    )


def _tensor_seed(seed: int, name: str) -> int:
    """A seed of each tensor's own, so that neither threads nor their order change what a method draws for it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
