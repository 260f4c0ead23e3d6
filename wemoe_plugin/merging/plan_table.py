"""A plan as lines for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wemoe_plugin.merging.operations import Operation, Upscale
from wemoe_plugin.merging.plan import MergePlan


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


def plan_lines(plan: MergePlan, peak_memory: int, jobs: int, format_size: Callable[[int], str]) -> list[str]:
    """What each rule claims, parameters, bytes read and written, and predicted memory.

    Args:
        plan: the plan.
        peak_memory: bytes above the imported process.
        jobs: the number of threads that figure is for.
        format_size: from bytes to text.
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
    wasteful = sum(_is_larger_than_dense(operation) for operation in plan.operations)
    if wasteful:
        lines += ["", f"low_rank takes more room than dense for {wasteful} tensors: the rank is too large for them"]
    parameters = f"parameters    {plan.base_parameters:,}"
    if plan.modules:
        total = plan.base_parameters + plan.vector_parameters + plan.router_parameters
        parameters += (
            f" static + {plan.vector_parameters:,} task vectors + {plan.router_parameters:,} routers = "
            f"{total / plan.base_parameters:.2f} x the base"
        )
    return [
        *lines,
        "",
        parameters,
        f"reads         {format_size(plan.bytes_read)}",
        f"writes        {format_size(plan.bytes_written)} in {len(plan.files)} file{'s' * (len(plan.files) != 1)}",
        f"peak memory   {format_size(peak_memory)} above the imported process, with {jobs} threads",
    ]


def _is_larger_than_dense(operation: Operation) -> bool:
    if not isinstance(operation, Upscale) or operation.rank is None:
        return False
    dense = len(operation.mixture.inputs) * operation.output.elements
    return sum(vector.elements for vector in operation.vectors) >= dense


def plan_json(plan: MergePlan, peak_memory: int) -> dict[str, Any]:
    """The same as values."""
    return {
        "base": str(plan.base.checkpoint.path),
        "experts": [expert.name for expert in plan.experts],
        "claims": [vars(claim) for claim in plan.claims],
        "base_only": list(plan.base_only),
        "notes": list(plan.notes),
        "modules": [module.path for module in plan.modules],
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
