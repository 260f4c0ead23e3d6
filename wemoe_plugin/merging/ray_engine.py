"""Carry out the pieces of a plan by the workers of a Ray cluster whose machines share a file system.

The driver, which is the process that was asked for the merge, allocates the output's files, hands out batches of
pieces, and notes what comes back. A worker opens inputs and outputs itself, stores its results in their place, and
answers when they are on the disk. A piece makes the same bytes whoever carries it out and however often, so the
batches of a worker that was lost are simply given to another one.
"""

from __future__ import annotations

import functools
import os
import platform
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wemoe_plugin.checkpoints.ranges import RangeReader, TensorFile
from wemoe_plugin.errors import PlanError, WemoeError
from wemoe_plugin.merging.memory import available_processors
from wemoe_plugin.merging.operations import Operation
from wemoe_plugin.merging.plan import MergePlan
from wemoe_plugin.merging.work import Piece, bytes_of_piece, make_worker

BATCH_BYTES = 64_000_000
"""Input bytes of a batch: enough that handing it out and opening its files take no time beside it."""

RETRIES = 3
"""How often a batch is given to another worker after one was lost with it."""

_OBJECT_STORE_BYTES = 256 << 20
"""Of a cluster of our own; only the plan lies in it."""

_PATIENCE = ((False, 5), (True, 30))
"""After a failure: whether to kill the workers that are still at work, and the seconds to wait for their end."""

Batch = tuple[Piece, ...]


@dataclass(frozen=True)
class Job:
    """What a worker must know beside its batches.

    Attributes:
        directory: absolute, with the output's files.
        folder: where the plan's relative paths start.
        device: of the arithmetic.
    """

    plan: MergePlan
    directory: Path
    folder: Path
    device: str


def import_ray() -> Any:
    """The module ``ray``, which then sends no usage statistics.

    Raises:
        WemoeError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # it would copy the current folder to the workers
    try:
        with _signals_kept():
            import ray
    except ImportError as error:
        raise WemoeError(f"--engine ray: {error}; install it with: pip install 'wemoe-plugin[ray]'") from None
    return ray


def run_on_ray(
    plan: MergePlan,
    directory: Path,
    work: Iterator[Piece],
    needs: Sequence[int],
    finished: Callable[[Piece], None],
    *,
    jobs: int | None,
    max_memory: int | None,
    device: str,
) -> None:
    """Have the workers of a cluster carry out all the work.

    The cluster is the one this process is connected to, else the one that ``RAY_ADDRESS`` names, else one of our own
    on this machine, which ends with the work.

    Args:
        plan: what to do.
        directory: where the output's files are, their space allocated and on the disk.
        work: the pieces to be done.
        needs: bytes that the largest piece of each operation takes.
        finished: told about every piece whose result is on the disk.
        jobs: batches at work at the same time; default as many as the cluster has processors.
        max_memory: bytes that all batches at work may take; one takes what its largest piece does.
        device: ``cpu``, or ``cuda`` for one GPU of Ray's per worker.

    Raises:
        WemoeError: whatever a piece raises, or Ray is not installed.
        PlanError: the cluster cannot be reached, does not see the output or has no GPU, or one batch was lost with
            several workers.
    """
    ray = import_ray()
    gpus = _gpus_per_worker(device)

    def need(batch: Batch) -> int:
        return max(needs[piece.operation] for piece in batch)

    def admits(batch: Batch) -> bool:
        fits = max_memory is None or need(batch) + sum(map(need, at_work.values())) <= max_memory
        return fits and len(at_work) < (jobs or 2 * _total(ray, "CPU"))

    at_work: dict[Any, Batch] = {}
    with _cluster(ray, jobs):
        if gpus and not _total(ray, "GPU"):
            raise PlanError(f"--engine ray --device {device}: no machine of the cluster has a GPU")
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=False)(carry_out)
        held = [ray.put(Job(plan, directory.absolute(), Path.cwd(), device))]
        batches = _batches(plan.operations, work)
        batch = next(batches, None)
        try:
            while batch is not None or at_work:
                while batch is not None and admits(batch):
                    at_work[task.remote(held, batch)] = batch
                    batch = next(batches, None)
                for answer in ray.wait(list(at_work))[0]:
                    done = at_work.pop(answer)
                    _check(ray, answer, plan, done)
                    for piece in done:
                        finished(piece)
        finally:
            _stop(ray, list(at_work))


def carry_out(held: list[Any], batch: Batch) -> None:
    """Do a batch, in a worker.

    Args:
        held: the reference to the `Job`; in a list, since Ray would else read it anew for every batch.
        batch: pieces, done one after the other.

    Raises:
        CheckpointError: an input is not as it should be.
        PlanError: the output's files are not there.
        OSError: they cannot be written to.
    """
    from wemoe_plugin.merging.executor import one_thread_per_operation, sync_all

    job = _fetched(held[0])
    plan = job.plan
    operations = [plan.operations[piece.operation] for piece in batch]
    inputs = {file: plan.stamps[file] for o in operations for source in o.sources for file in source.files}
    with ExitStack() as stack:
        places = _opened_outputs(job, operations, stack)
        reader = stack.enter_context(RangeReader(inputs, job.folder))
        try:
            worker = make_worker(plan.operations, plan.dtype, job.device, reader, places)
        except ImportError:
            # An earlier task of this process was stopped while it imported torch, which cannot be imported again here.
            os._exit(1)
        stack.enter_context(one_thread_per_operation())
        for operation, piece in zip(operations, batch, strict=True):
            worker.run(operation, piece.start, piece.elements)
        sync_all(places)


@functools.lru_cache(maxsize=1)
def _fetched(reference: Any) -> Job:
    job: Job = import_ray().get(reference)
    return job


def _opened_outputs(job: Job, operations: Sequence[Operation], stack: ExitStack) -> dict[str, TensorFile]:
    """The files that the operations' results go to, by the names of their tensors."""
    stored = {tensor.name for operation in operations for tensor in operation.written}
    places: dict[str, TensorFile] = {}
    for planned in job.plan.files:
        if stored.isdisjoint(tensor.name for tensor in planned.tensors):
            continue
        path = job.directory / planned.name
        try:
            file = TensorFile(path, ((t.name, t.dtype, t.shape) for t in planned.tensors), made=True)
        except FileNotFoundError:
            raise PlanError(
                f"{path}: Ray's machine {platform.node()} does not see it; inputs and output must lie on a file "
                "system that all machines of the cluster share, under the same paths"
            ) from None
        stack.callback(file.close)
        places |= {tensor.name: file for tensor in planned.tensors}
    return places


def _batches(operations: Sequence[Operation], work: Iterator[Piece]) -> Iterator[Batch]:
    """Ranges in batches of about `BATCH_BYTES`; a whole tensor, whose decomposition takes long, is one alone."""
    batch: list[Piece] = []
    nbytes = 0
    for piece in work:
        operation = operations[piece.operation]
        if operation.whole:
            yield (piece,)
            continue
        batch.append(piece)
        nbytes += bytes_of_piece(operation, piece)
        if nbytes >= BATCH_BYTES:
            yield tuple(batch)
            batch, nbytes = [], 0
    if batch:
        yield tuple(batch)


def _check(ray: Any, answer: Any, plan: MergePlan, batch: Batch) -> None:
    """Raise what a worker has raised, as if it had been raised here."""
    try:
        ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from (None if isinstance(error.cause, WemoeError) else error)
    except ray.exceptions.RayError as error:
        name = plan.operations[batch[0].operation].output.name
        why = str(error).strip().splitlines()[0]
        raise PlanError(
            f"Ray lost {RETRIES + 1} workers one after the other over the batch that begins with {name!r}: {why}"
        ) from error


def _stop(ray: Any, answers: list[Any]) -> None:
    """End all work: a late worker must not write into what the next merge makes in the same place."""
    for force, seconds in _PATIENCE:
        if not answers:
            return
        for answer in answers:
            ray.cancel(answer, force=force)
        answers = ray.wait(answers, num_returns=len(answers), timeout=seconds)[1]


def _gpus_per_worker(device: str) -> int:
    if device.startswith("cuda:"):
        raise PlanError(f"--engine ray --device {device}: Ray gives each worker a GPU of its own; use --device cuda")
    return int(device == "cuda")


def _total(ray: Any, resource: str) -> int:
    return max(int(ray.cluster_resources().get(resource, 0)), int(resource == "CPU"))


@contextmanager
def _cluster(ray: Any, jobs: int | None) -> Iterator[None]:
    """The cluster that is configured, else one of our own in a temporary folder.

    Raises:
        PlanError: it cannot be reached or started.
    """
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS", "")
    with ExitStack() as stack:
        try:
            if address in ("", "local"):
                options = stack.enter_context(_options_of_our_own(jobs))
            else:
                _knock(address)
                options = {"address": address}
            stack.callback(ray.shutdown)
            with _signals_kept():
                ray.init(**options, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            what = f"RAY_ADDRESS {address}: cannot be reached" if address else "--engine ray: Ray does not start"
            raise PlanError(f"{what}: {error}") from error
        yield


@contextmanager
def _options_of_our_own(jobs: int | None) -> Iterator[dict[str, Any]]:
    """What starts a cluster on this machine that leaves nothing behind: neither logs nor a secret."""
    root = os.environ.get("RAY_TMPDIR", "/tmp")  # short: it holds sockets, whose paths have a limit
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray would keep one in the user's home
    try:
        with tempfile.TemporaryDirectory(prefix="wemoe-ray-", dir=root, ignore_cleanup_errors=True) as folder:
            yield {
                "address": "local",
                "num_cpus": jobs or available_processors(),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": folder,
            }
    finally:
        for name, value in before.items():  # Ray sets the mode
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _knock(address: str) -> None:
    """Find out in seconds that nobody listens at an address; Ray takes many minutes."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray would exit on SIGTERM by itself; ours removes what is half-written first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
