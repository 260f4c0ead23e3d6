"""Look at the task vectors before they are merged: to choose ranks by singular values, and to see what is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from wemoe_plugin.checkpoints.ranges import RangeReader
from wemoe_plugin.merging.allocator import return_large_buffers
from wemoe_plugin.merging.executor import one_thread_per_operation
from wemoe_plugin.merging.memory import PROCESS_BYTES, available_processors, compression_memory, spectrum_memory
from wemoe_plugin.merging.operations import Compress
from wemoe_plugin.merging.plan import MergePlan, is_parameter
from wemoe_plugin.merging.planner import plan_merge
from wemoe_plugin.merging.problems import takes_too_much
from wemoe_plugin.merging.sizes import no_room
from wemoe_plugin.recipe.loading import RecipeFile
from wemoe_plugin.recipe.schema import TaskVectorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from wemoe_plugin.merging.tensor_worker import TensorWorker

Progress = Callable[[int], None]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Loss:
    """What compression drops of one expert's task vector of one weight.

    Attributes:
        module: the upscaled module.
        form: of the task vector.
        norm: ‖τ‖ (Frobenius).
        dropped: ‖τ − what is kept‖.
    """

    module: str
    form: str
    norm: float
    dropped: float


def settle(
    source: RecipeFile,
    plan: MergePlan,
    *,
    jobs: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> MergePlan:
    """Choose the ranks that depend on singular values (``energy``, ``max_parameters``).

    Args:
        source: the recipe.
        plan: of the recipe.
        jobs: threads; default all processors.
        max_memory: bytes of all buffers together.
        device: where singular values are computed, a name of torch's.
        progress: told about input bytes as they are done.

    Returns:
        The plan with these ranks; the plan itself if it is settled.

    Raises:
        PlanError: ``max_parameters`` leaves no room for a rank of one, or one tensor needs more than ``max_memory``.
        CheckpointError: an input holds NaN or infinity, or was changed meanwhile.
    """
    if plan.settled:
        return plan
    specs = _specs(source, plan)
    wanted = _open(plan, specs)
    jobs = _bounded(wanted, lambda operation: spectrum_memory(operation, plan.dtype), jobs, max_memory)
    spectra = _each(plan, wanted, lambda worker, o: worker.singular_values(o), jobs, device, progress)
    chosen = dict.fromkeys(_still(wanted, spectra), 0)
    chosen |= _by_energy(wanted, spectra, specs, chosen)
    chosen |= _by_budget(source, plan, wanted, spectra, specs, chosen)
    ranks: dict[str, list[int]] = {}
    for operation, rank in zip(wanted, (chosen[i] for i in range(len(wanted))), strict=True):
        ranks.setdefault(operation.output.name, [0] * len(plan.experts))[operation.place] = rank
    return plan_merge(source, plan.shard_bytes, plan.seed, {name: tuple(own) for name, own in ranks.items()})


def survey_memory(source: RecipeFile, plan: MergePlan, jobs: int) -> int:
    """Bytes above the imported process at the worst moment of `settle`; 0 if the recipe leaves no rank open."""
    needs = [spectrum_memory(operation, plan.dtype) for operation in _open(plan, _specs(source, plan))]
    return sum(sorted(needs, reverse=True)[:jobs]) + PROCESS_BYTES["torch"] if needs else 0


def survey_bytes(source: RecipeFile, plan: MergePlan) -> int:
    """Input bytes that `settle` reads; 0 if the recipe leaves no rank open."""
    return sum(read.nbytes for operation in _open(plan, _specs(source, plan)) for read in operation.sources)


def losses(
    plan: MergePlan,
    *,
    jobs: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Loss]:
    """Compress every task vector that the plan compresses, keeping only what is lost.

    Args:
        plan: a settled plan.
        jobs: threads; default all processors.
        max_memory: bytes of all buffers together.
        device: where, a name of torch's.
        progress: told about input bytes as they are done.

    Raises:
        PlanError: one tensor needs more than ``max_memory``.
        CheckpointError: an input was changed meanwhile.
    """
    paths = {layer.tensor: module.path for module in plan.modules for layer in module.layers}
    wanted = compressions(plan)
    jobs = _bounded(wanted, lambda operation: compression_memory(operation, plan.dtype), jobs, max_memory)
    norms = _each(plan, wanted, lambda worker, o: worker.compressed(o)[2].tolist(), jobs, device, progress)
    return [Loss(paths[o.output.name], o.form, *pair) for o, pair in zip(wanted, norms, strict=True)]


def compressions(plan: MergePlan) -> list[Compress]:
    """Every task vector that the plan compresses."""
    return [operation for operation in plan.operations if isinstance(operation, Compress)]


def _specs(source: RecipeFile, plan: MergePlan) -> dict[str, TaskVectorSpec]:
    """How a rule wants the task vectors of each weight."""
    rules = source.recipe.rules
    return {
        layer.tensor: rules[module.rule].parameters.task_vectors or TaskVectorSpec()
        for module in plan.modules
        for layer in module.layers
    }


def _open(plan: MergePlan, specs: Mapping[str, TaskVectorSpec]) -> list[Compress]:
    """The compressions whose ranks depend on singular values."""
    return [operation for operation in compressions(plan) if specs[operation.output.name].open_rank is not None]


def _still(wanted: Sequence[Compress], spectra: Sequence[Tensor]) -> set[int]:
    """Task vectors that are zero, which only their values show; of a weight that nobody moved, all but the first."""
    zero = [i for i, values in enumerate(spectra) if not values.any()]
    kept = {wanted[i].output.name for i in set(range(len(wanted))).difference(zero)}
    still = set()
    for i in zero:
        name = wanted[i].output.name
        if name in kept:
            still.add(i)
        kept.add(name)
    return still


def _by_energy(
    wanted: Sequence[Compress],
    spectra: Sequence[Tensor],
    specs: Mapping[str, TaskVectorSpec],
    settled: Mapping[int, int],
) -> dict[int, int]:
    from wemoe_plugin.task_vectors.ranks import rank_for_energy

    chosen = {}
    for i, (operation, values) in enumerate(zip(wanted, spectra, strict=True)):
        energy = specs[operation.output.name].energy
        if energy is not None and i not in settled:
            chosen[i] = rank_for_energy(values, energy)
    return chosen


def _by_budget(
    source: RecipeFile,
    plan: MergePlan,
    wanted: Sequence[Compress],
    spectra: Sequence[Tensor],
    specs: Mapping[str, TaskVectorSpec],
    settled: Mapping[int, int],
) -> dict[int, int]:
    from wemoe_plugin.task_vectors.ranks import allot_ranks

    bounded = [i for i, operation in enumerate(wanted) if specs[operation.output.name].max_parameters is not None]
    limited = [i for i in bounded if i not in settled]
    if not limited:
        return {}
    (multiple,) = {specs[wanted[i].output.name].max_parameters for i in limited}
    assert multiple is not None
    # What has its size already: base, routers, task vectors of other rules, with the ranks they have just been given.
    open_parts = {part.name for operation in wanted for part in operation.parts}
    stored = (tensor for file in plan.vector_files for tensor in file.tensors)
    fixed = sum(tensor.elements for tensor in stored if is_parameter(tensor.name) and tensor.name not in open_parts)
    fixed += sum(rank * sum(wanted[i].output.shape) for i, rank in settled.items())
    fixed += plan.base_parameters + plan.router_parameters
    costs = [sum(wanted[i].output.shape) for i in limited]
    room = int(multiple * plan.base_parameters) - fixed
    if room < sum(costs):
        raise no_room(source, multiple, fixed + sum(costs), plan.base_parameters)
    ranks = allot_ranks([spectra[i] for i in limited], costs, room)
    return dict(zip(limited, ranks, strict=True))


def _bounded(
    operations: Sequence[Compress], needs: Callable[[Compress], int], jobs: int | None, max_memory: int | None
) -> int:
    """As many threads as memory allows.

    Raises:
        PlanError: it does not allow one.
    """
    jobs = jobs or available_processors()
    if max_memory is None or not operations:
        return jobs
    largest = max(operations, key=needs)
    if needs(largest) > max_memory:
        raise takes_too_much(largest.output, needs(largest), max_memory)
    return min(jobs, max_memory // needs(largest))


def _each(
    plan: MergePlan,
    operations: Sequence[Compress],
    look: Callable[[TensorWorker, Compress], _Result],
    jobs: int,
    device: str,
    progress: Progress | None,
) -> list[_Result]:
    """What a function sees in each task vector, in the operations' order."""
    from wemoe_plugin.merging.tensor_worker import TensorWorker

    return_large_buffers()
    with RangeReader(plan.stamps) as reader:
        worker = TensorWorker(plan.dtype, device, reader, {})

        def run(operation: Compress) -> _Result:
            result = look(worker, operation)
            if progress is not None:
                progress(sum(source.nbytes for source in operation.sources))
            return result

        with one_thread_per_operation(), ThreadPoolExecutor(jobs, thread_name_prefix="survey") as pool:
            results = list(pool.map(run, operations))
        reader.check_unchanged()
    return results
