"""A plan as lines for people and as JSON for machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from wemoe_plugin.merging.module_table import ModuleRow, describe_router, describe_sizes, module_lines
from wemoe_plugin.merging.operations import Compress
from wemoe_plugin.merging.plan import MergePlan, is_parameter

if TYPE_CHECKING:
    from wemoe_plugin.merging.survey import Loss


def summary_lines(plan: MergePlan) -> list[str]:
    """What is merged, in one or two lines."""
    names = ", ".join(expert.name for expert in plan.experts)
    lines = [f"base {plan.base.checkpoint.path} ({plan.library}), {len(plan.experts)} experts: {names}"]
    if plan.modules:
        forms = sorted({module.form for module in plan.modules})
        count = (
            "1 module becomes a mixture" if len(plan.modules) == 1 else f"{len(plan.modules)} modules become mixtures"
        )
        lines.append(f"{count} of experts, task vectors {', '.join(forms)}")
    return [*lines, *(f"note: {note}" for note in plan.notes)]


def module_rows(plan: MergePlan, losses: Sequence[Loss] = ()) -> list[ModuleRow]:
    """The upscaled modules.

    Args:
        plan: the plan.
        losses: what compression drops, where it has been measured.
    """
    stored = {tensor.name: tensor for file in plan.vector_files for tensor in file.tensors}
    tensors = plan.base.checkpoint.tensors
    lost: dict[str, list[Loss]] = {}
    for loss in losses:
        lost.setdefault(loss.module, []).append(loss)
    rows = []
    for module in plan.modules:
        vectors = [stored[name] for layer in module.layers for name, _ in layer.vectors]
        own, router = lost.get(module.path, []), module.router
        known = bool(own) or module.form == "dense"
        rows.append(
            ModuleRow(
                module.path,
                describe_sizes(module.form, (layer.sizes for layer in module.layers)),
                describe_router(router.name, module.path, router.depth, router.width, router.routing),
                module.lambdas,
                sum(tensor.elements for name, tensor in tensors.items() if name.startswith(f"{module.path}.")),
                sum(vector.elements for vector in vectors if is_parameter(vector.name)),
                sum(vector.nbytes for vector in vectors),
                math.hypot(*(loss.norm for loss in own)) if known else None,
                math.hypot(*(loss.dropped for loss in own)) if known else None,
            )
        )
    return rows


def plan_lines(
    plan: MergePlan, peak_memory: int, jobs: int, format_size: Callable[[int], str], losses: Sequence[Loss] = ()
) -> list[str]:
    """What each rule claims, the upscaled modules, parameters, bytes read and written, and predicted memory.

    Args:
        plan: the plan.
        peak_memory: bytes above the imported process.
        jobs: the number of threads that figure is for.
        format_size: from bytes to text.
        losses: what compression drops, where it has been measured.
    """
    width = max(len(claim.label) for claim in plan.claims)
    lines = [*summary_lines(plan), ""]
    lines.append(f"{'part':<{width}}  {'method':<16}{'tensors':>8}{'parameters':>16}{'modules':>9}")
    for claim in plan.claims:
        modules = str(claim.modules) if claim.modules else "-"
        counts = f"{claim.tensors:>8,}{claim.parameters:>16,}{modules:>9}"
        lines.append(f"{claim.label:<{width}}  {claim.method:<16}{counts}")
    if plan.base_only:
        lines += ["", f"{len(plan.base_only)} tensors that no expert has are the base's, {plan.base_only[0]} the first"]
    wasteful = _larger_than_dense(plan) if plan.settled else 0
    if wasteful:
        lines += [
            "",
            f"compressed, {wasteful} tensors take more room than dense: rank or density is too large for them",
        ]
    if plan.modules:
        lines += ["", *module_lines(module_rows(plan, losses), format_size)]
        if plan.open_ranks:
            known = " and ".join(_OPEN_RANKS[kind] for kind in plan.open_ranks)
            lines.append(f"ranks are {known}: they are chosen by singular values; --measure shows them")
    parameters = f"parameters    {plan.base_parameters:,}"
    if plan.modules:
        total = plan.base_parameters + plan.vector_parameters + plan.router_parameters
        parameters += (
            f" static + {plan.vector_parameters:,} task vectors + {plan.router_parameters:,} routers = "
            f"{_bound(plan)}{total / plan.base_parameters:.2f} x the base"
        )
    return [
        *lines,
        "",
        parameters,
        f"reads         {format_size(plan.bytes_read)}",
        f"writes        {format_size(plan.bytes_written)} in {len(plan.files)} file{'s' * (len(plan.files) != 1)}",
        f"peak memory   {format_size(peak_memory)} above the imported process, with {jobs} threads",
    ]


_OPEN_RANKS = {"energy": "upper bounds", "max_parameters": "an even share of max_parameters"}


def _bound(plan: MergePlan) -> str:
    return "" if plan.settled else "about " if "max_parameters" in plan.open_ranks else "at most "


def _larger_than_dense(plan: MergePlan) -> int:
    """How many tensors' task vectors take at least as many bytes as in the dense form."""
    compressed = {operation.output: operation for operation in plan.operations if isinstance(operation, Compress)}
    return sum(
        sum(part.nbytes for part in operation.parts) >= len(plan.experts) * output.nbytes
        for output, operation in compressed.items()
    )


def plan_json(plan: MergePlan, peak_memory: int, losses: Sequence[Loss] = ()) -> dict[str, Any]:
    """The same as values."""
    return {
        "base": str(plan.base.checkpoint.path),
        "experts": [expert.name for expert in plan.experts],
        "claims": [vars(claim) for claim in plan.claims],
        "base_only": list(plan.base_only),
        "notes": list(plan.notes),
        "modules": [{**vars(row), "error": row.error} for row in module_rows(plan, losses)],
        "settled": plan.settled,
        "parameters": {
            "static": plan.base_parameters,
            "task_vectors": plan.vector_parameters,
            "routers": plan.router_parameters,
        },
        "files": {file.name: file.nbytes for file in plan.files},
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": peak_memory,
    }
