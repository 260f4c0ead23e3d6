"""The command ``wemoe-merge``: parse, call, print. Whatever is heavy is imported inside the commands."""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from wemoe_plugin.errors import WemoeError

if TYPE_CHECKING:
    from wemoe_plugin.merging.executor import Progress
    from wemoe_plugin.merging.plan import MergePlan
    from wemoe_plugin.recipe.loading import RecipeFile
    from wemoe_plugin.recipe.schema import TuningSpec
    from wemoe_plugin.tuning.loop import Check


class _DefaultGroup(TyperGroup):
    """``wemoe-merge recipe.yaml`` means ``wemoe-merge merge recipe.yaml``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {"--help", "--version", "--install-completion", "--show-completion"}
        if args and args[0] not in self.commands and args[0] not in own:
            near = difflib.get_close_matches(args[0], self.commands, 1, 0.7)
            if near and not Path(args[0]).exists():
                raise WemoeError(f"{args[0]}: no such file; did you mean the command {near[0]!r}?")
            args = ["merge", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultGroup,
    help="Merge fine-tuned models of one base: statically, or as a weight-ensembling mixture of experts.\n\n"
    "The main job is [bold]wemoe-merge recipe.yaml[/bold]. To see it at work: [bold]wemoe-merge demo[/bold].",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
DirectoryArgument = Annotated[Path, typer.Argument(metavar="DIR", help="An output directory of wemoe-merge.")]
DeviceOption = Annotated[str, typer.Option(help="Where models run: cpu, cuda, cuda:1, mps.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Seed of the data order; default the recipe's.")]
ShardOption = Annotated[str, typer.Option(help="Largest weights file to write, such as 5GB; open_clip keeps one file.")]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; exits with status 0 done, 2 the input is wrong, 1 anything else."""
    try:
        app(args=list(args) if args is not None else None, prog_name="wemoe-merge")
    except WemoeError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os._exit(1)  # whoever read our output is gone; flushing at exit would only raise again
    except Exception as error:
        if os.environ.get("WEMOE_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error}\n(unexpected; set WEMOE_DEBUG=1 to see where)", 1)


def _fail(message: str, status: int) -> None:
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    sys.exit(status)


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(importlib.metadata.version("wemoe-plugin"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("merge")
def merge_command(
    recipe: RecipeArgument,
    out: Annotated[Path | None, typer.Option(help="Output directory; default merged/<recipe stem>.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output.")] = False,
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Merge only, even if the recipe has tuning.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; default all processors.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Limit of all buffers together, such as 4GiB.")] = None,
    shard_size: ShardOption = "5GB",
    device: DeviceOption = "cpu",
    seed: SeedOption = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Merge a recipe, and tune and score the result if the recipe says so. (The default command.)"""
    say = _speaker(quiet or json)
    limit = None if max_memory is None else _bytes(max_memory, "--max-memory")
    timings: dict[str, float] = {}
    with _timed(timings, "plan"):
        source, plan = _planned(recipe, shard_size)
        target = out if out is not None else Path("merged") / recipe.stem
        from wemoe_plugin.checkpoints.staging import check_output

        check_output(target, force)
    for line in _summary(plan):
        say(line)
    from wemoe_plugin.pipeline.merge import merge
    from wemoe_plugin.pipeline.workbench import Workbench

    tuning = None if no_tune else source.recipe.tuning
    workbench = None
    if tuning is not None:
        with _timed(timings, "data"):
            workbench = Workbench(source, device)
            scoring = all(task.score is not None for task in workbench.tasks.values())
            workbench.check(scoring=scoring)
    with _timed(timings, "merge"), _progress(plan.bytes_read, quiet or json) as progress:
        merge(source, plan, target, force=force, jobs=jobs, max_memory=limit, progress=progress)
    say(f"merged {_size(plan.bytes_read)} into {_size(plan.bytes_written)} in {timings['merge']:.1f} s: {target}")
    result: dict[str, Any] = {"directory": str(target), "seconds": timings}
    if workbench is not None and tuning is not None:
        from wemoe_plugin.pipeline.evaluate import evaluate_directory
        from wemoe_plugin.pipeline.tune import tune_directory

        with _timed(timings, "tune"):
            outcome = tune_directory(target, workbench, _reseeded(tuning, seed), say=say, on_check=_check_printer(say))
        _tell_outcome(outcome, say)
        result["tuning"] = {"best_step": outcome.best_step, "collapsed": list(outcome.collapsed)}
        if scoring:
            scores = evaluate_directory(target, workbench, say=say, seconds=timings)
            result |= scores.to_json()
            _tell_scores(scores, say)
            say(f"report: {target / 'report.html'}")
    if json:
        _print_json(result)


@app.command("plan")
def plan_command(
    recipe: RecipeArgument,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Threads the merge would use; default all processors.")
    ] = None,
    shard_size: ShardOption = "5GB",
    json: JsonOption = False,
) -> None:
    """Show what a merge would do, from the files' headers alone: no tensor is read, nothing is written."""
    _, plan = _planned(recipe, shard_size)
    from wemoe_plugin.merging.memory import peak_memory

    jobs = jobs or len(os.sched_getaffinity(0))
    peak = peak_memory(plan.operations, plan.dtype, jobs)
    if json:
        _print_json(_plan_json(plan, peak))
        return
    for line in _summary(plan):
        typer.echo(line)
    typer.echo("")
    width = max(len(claim.label) for claim in plan.claims)
    typer.echo(f"{'part':<{width}}  {'method':<16}{'tensors':>8}{'parameters':>16}{'modules':>9}")
    for claim in plan.claims:
        modules = str(claim.modules) if claim.modules else "-"
        typer.echo(f"{claim.label:<{width}}  {claim.method:<16}{claim.tensors:>8,}{claim.parameters:>16,}{modules:>9}")
    if plan.base_only:
        typer.echo(f"\n{len(plan.base_only)} tensors that no expert has are the base's, {plan.base_only[0]} the first")
    typer.echo("")
    if plan.modules:
        total = plan.base_parameters + plan.vector_parameters + plan.router_parameters
        typer.echo(
            f"parameters    {plan.base_parameters:,} static + {plan.vector_parameters:,} task vectors + "
            f"{plan.router_parameters:,} routers = {total / plan.base_parameters:.2f} x the base"
        )
    else:
        typer.echo(f"parameters    {plan.base_parameters:,}")
    typer.echo(f"reads         {_size(plan.bytes_read)}")
    typer.echo(f"writes        {_size(plan.bytes_written)} in {len(plan.files)} files")
    typer.echo(f"peak memory   {_size(peak)} of buffers with {jobs} threads, above the imported process")


@app.command("tune")
def tune_command(
    directory: DirectoryArgument, device: DeviceOption = "cpu", seed: SeedOption = None, quiet: QuietOption = False
) -> None:
    """Tune the routers of an output directory on its recipe's unlabeled data."""
    say = _speaker(quiet)
    from wemoe_plugin.pipeline.merge import recipe_of
    from wemoe_plugin.pipeline.tune import tune_directory
    from wemoe_plugin.pipeline.workbench import Workbench
    from wemoe_plugin.recipe.schema import TuningSpec

    source = recipe_of(directory)
    spec = _reseeded(source.recipe.tuning or TuningSpec(), seed)
    workbench = Workbench(source, device)
    workbench.check(scoring=False)
    outcome = tune_directory(directory, workbench, spec, say=say, on_check=_check_printer(say))
    _tell_outcome(outcome, say)


@app.command("evaluate")
def evaluate_command(
    directory: DirectoryArgument, device: DeviceOption = "cpu", quiet: QuietOption = False, json: JsonOption = False
) -> None:
    """Score base, experts, static merge and merged model on the recipe's labeled data."""
    say = _speaker(quiet or json)
    from wemoe_plugin.pipeline.evaluate import evaluate_directory
    from wemoe_plugin.pipeline.merge import recipe_of
    from wemoe_plugin.pipeline.workbench import Workbench

    scores = evaluate_directory(directory, Workbench(recipe_of(directory), device), say=say)
    _tell_scores(scores, say)
    say(f"report: {directory / 'report.html'}")
    if json:
        _print_json(scores.to_json())


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Where to put recipe, data and results.")] = Path("wemoe-demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images, the routers and the data order.")] = 0,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """See it work: four tiny experts become one model that keeps their accuracy. About a minute on two cores."""
    say = _speaker(quiet)
    from wemoe_plugin.demo.workspace import prepare_demo

    recipe = prepare_demo(out, seed=seed, force=force, say=say)
    say(f"recipe: {recipe}\n$ wemoe-merge {recipe} --out {out / 'merged'}")
    merge_command(recipe, out=out / "merged", force=force, device=device, quiet=quiet)
    say(f"\nEverything is in {out}/: recipe.yaml, data/, models/, merged/")
    say(f'Load it: from wemoe_plugin import load_model; model = load_model("{out / "merged"}")')


def _reseeded(spec: TuningSpec, seed: int | None) -> TuningSpec:
    return spec if seed is None else spec.model_copy(update={"seed": seed})


def _planned(recipe: Path, shard_size: str) -> tuple[RecipeFile, MergePlan]:
    from wemoe_plugin.merging.plan import plan_merge
    from wemoe_plugin.recipe.loading import load_recipe

    source = load_recipe(recipe)
    return source, plan_merge(source, _bytes(shard_size, "--shard-size"))


def _summary(plan: MergePlan) -> list[str]:
    names = ", ".join(expert.name for expert in plan.experts)
    lines = [f"base {plan.base.checkpoint.path} ({plan.library}), {len(plan.experts)} experts: {names}"]
    if plan.modules:
        forms = sorted({module.form for module in plan.modules})
        lines.append(f"{len(plan.modules)} modules become mixtures of experts, task vectors {', '.join(forms)}")
    return lines


def _plan_json(plan: MergePlan, peak: int) -> dict[str, Any]:
    return {
        "base": str(plan.base.checkpoint.path),
        "experts": [expert.name for expert in plan.experts],
        "claims": [vars(claim) for claim in plan.claims],
        "base_only": list(plan.base_only),
        "modules": [module.path for module in plan.modules],
        "parameters": {
            "static": plan.base_parameters,
            "task_vectors": plan.vector_parameters,
            "routers": plan.router_parameters,
        },
        "files": {file.name: file.nbytes for file in plan.files},
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": peak,
    }


class _Speaker:
    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, line: str) -> None:
        if not self.quiet:
            typer.echo(line)


def _speaker(quiet: bool) -> _Speaker:
    return _Speaker(quiet)


def _check_printer(say: _Speaker) -> Any:
    def show(check: Check) -> None:
        loss = "" if check.step == 0 else f"  loss {check.loss:8.4f}"
        say(f"  step {check.step:5d}  held-out {check.held_out:8.4f}{loss}")

    return show


def _tell_outcome(outcome: Any, say: _Speaker) -> None:
    if outcome.collapsed:
        say(
            f"predictions on {', '.join(outcome.collapsed)} collapsed onto few classes: stopped and went back to step "
            f"{outcome.best_step}. Try objective: distill, or a smaller learning_rate."
        )
    else:
        say(f"kept the routers of step {outcome.best_step}, the best on held-out data")


def _tell_scores(scores: Any, say: _Speaker) -> None:
    from wemoe_plugin.evaluation.report import score_lines

    say("")
    for line in score_lines(scores):
        say(line)


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[name] = round(time.perf_counter() - started, 3)


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Progress | None]:
    """A bar on a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("merge", total=total)
        yield lambda done: bar.advance(job, done)


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(text: str, option: str) -> int:
    """From ``4GiB`` to bytes."""
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().upper() or "B"
    try:
        value = int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value <= 0:
        raise WemoeError(f"{option} {text!r} is not a size such as 500MB or 4GiB")
    return value


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
