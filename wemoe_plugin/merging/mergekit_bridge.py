"""Carry out mergekit's methods, and make ours known to it: the only module that imports mergekit."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    PerInputValues,
    TensorEntry,
    TensorGroup,
    TensorMetadata,
)
from mergekit.merge_methods.base import ParameterSpec
from pydantic import ValidationError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wemoe_plugin.errors import PlanError, RecipeError
from wemoe_plugin.merging.operations import Delegate
from wemoe_plugin.merging.spectral import isotropic_merge, task_singular_vectors_merge
from wemoe_plugin.recipe.methods import OURS
from wemoe_plugin.recipe.whole import WholeRecipe

_DRAWING = (torch.bernoulli, torch.randint, torch.rand, torch.randn, torch.normal, torch.randperm, torch.multinomial)


_REGISTERING = threading.Lock()


class _OwnGenerator(TorchFunctionMode):
    """Inside of it, in this thread, whatever draws numbers draws them from one generator of its own.

    mergekit's kernels use torch's, which all threads share: results would depend on which of them comes first.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self.generator = torch.Generator(device).manual_seed(seed)

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        own = {"generator": self.generator} if function in _DRAWING else {}
        return function(*args, **{**(keywords or {}), **own})


class _SpectralMerge(GroupMergeMethod):  # type: ignore[misc]
    """A merge of task vectors by their singular values, as a method of mergekit's."""

    def __init__(self, name: str) -> None:
        method = OURS[name]
        self.merge = {"iso_c": isotropic_merge, "tsv_m": task_singular_vectors_merge}[name]
        self.spec = MergeMethodSpec(
            name=name,
            pretty_name=method.title,
            reference_url=method.source,
            parameters=(
                ParameterSpec("lambda", float, ParameterScope.SHARED, default=1.0),
                ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0),
            ),
            contract=InputContract(base=BasePolicy.REQUIRED),
        )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        base: Tensor = group.base.tensor
        if not group.non_base:
            return base
        stored, base = base.dtype, base.to(torch.promote_types(base.dtype, torch.float32))  # decompositions need it
        vectors = torch.stack([(entry.tensor - base) * parameters["weight"][entry.id] for entry in group.non_base])
        merged: Tensor = base + parameters["lambda"] * self.merge(vectors)
        return merged.to(stored)


def register_methods() -> None:
    """Make ``iso_c`` and ``tsv_m`` known to mergekit by name, for its own commands run in this process too.

    Calling it again changes nothing.
    """
    with _REGISTERING:
        known = {method.spec.name for method in merge_methods.registered_methods()}
        for name in ("iso_c", "tsv_m"):
            if name not in known:
                merge_methods.register(_SpectralMerge(name))


def merge_tensors(operation: Delegate, tensors: Sequence[Tensor]) -> Tensor:
    """Call a method's kernel.

    Args:
        operation: which method, its parameters, which input is the base, and the seed if it draws numbers.
        tensors: the inputs, of one shape, dtype and device.

    Returns:
        The merged tensor, of the same shape and dtype.
    """
    register_methods()
    method = merge_methods.get(operation.method)
    entries = tuple(TensorEntry(k, tensor, is_base=k == operation.base) for k, tensor in enumerate(tensors))
    group = TensorGroup(entries, TensorMetadata(operation.output.name))
    parameters: dict[str, Any] = dict(operation.shared)
    for parameter in method.spec.input_parameters:
        ids = [e.id for e in entries if not (e.is_base and parameter.scope == ParameterScope.NON_BASE)]
        parameters[parameter.name] = PerInputValues([(k, operation.per_input[k][parameter.name]) for k in ids])
    drawing = nullcontext() if operation.seed is None else _OwnGenerator(operation.seed, tensors[0].device)
    result: Tensor
    with drawing:
        (result,) = method((group,), parameters=parameters)
    return result


def run_recipe(recipe: WholeRecipe, directory: Path, options: Mapping[str, Any]) -> None:
    """Carry out a recipe as ``mergekit-yaml`` does.

    Args:
        recipe: for mergekit.
        directory: an existing directory to write to.
        options: of mergekit's ``MergeOptions``.

    Raises:
        RecipeError: mergekit does not accept the recipe.
        PlanError: mergekit cannot carry it out.
    """
    import transformers
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    register_methods()
    if options.get("quiet"):
        transformers.logging.set_verbosity_error()
    try:
        configuration = MergeConfiguration.model_validate(recipe.data)
    except (ValidationError, RuntimeError) as error:
        raise RecipeError(f"{recipe.path}: mergekit does not accept it: {error}") from None
    hidden = redirect_stderr(io.StringIO()) if options.get("quiet") else nullcontext()  # it has bars that never are
    try:
        with hidden:
            run_merge(configuration, str(directory), MergeOptions(**options), config_source=recipe.text)
    except Exception as error:  # mergekit raises anything
        raise PlanError(f"{recipe.path}: mergekit cannot carry it out: {error}") from error
