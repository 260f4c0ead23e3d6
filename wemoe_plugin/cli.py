"""The command ``wemoe-merge``: parse, call, print. Whatever is heavy is imported inside the commands."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from wemoe_plugin.console import (
    Say,
    check_printer,
    format_size,
    parse_size,
    print_json,
    progress_bar,
    speaker,
    tell_outcome,
    tell_scores,
    timed,
)
from wemoe_plugin.devices import check_device
from wemoe_plugin.errors import WemoeError

if TYPE_CHECKING:
    from wemoe_plugin.merging.plan import MergePlan
    from wemoe_plugin.merging.survey import Loss
    from wemoe_plugin.pipeline.workbench import Workbench
    from wemoe_plugin.recipe.loading import RecipeFile
    from wemoe_plugin.recipe.schema import TuningSpec
    from wemoe_plugin.recipe.whole import WholeRecipe


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
DeviceOption = Annotated[str, typer.Option(help="Where models run and tensors are merged: cpu, cuda, cuda:1, mps.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Seed of routers and data order; default the recipe's.")]
ShardOption = Annotated[str, typer.Option(help="Largest weights file to write, such as 5GB; open_clip keeps one file.")]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; exits with status 0 done, 2 the input is wrong, 1 anything else, 130 interrupted."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # so that what is half-written is removed
    try:
        app(args=list(args) if args is not None else None, prog_name="wemoe-merge")
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            typer.echo("interrupted; nothing half-written is left", err=True)
        raise
    except WemoeError as error:
        _fail(str(error), 2)
    except Exception as error:
        if os.environ.get("WEMOE_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error}\n(unexpected; set WEMOE_DEBUG=1 to see where)", 1)


_INTERRUPTED = 130


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a merge that was killed.")] = False,
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Merge only, even if the recipe has tuning.")] = False,
    engine: Annotated[str, typer.Option(help="Who merges: threads, or ray for the workers of a cluster.")] = "threads",
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads or workers; default all processors.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Limit of all buffers together, such as 4GiB.")] = None,
    shard_size: ShardOption = "5GB",
    device: DeviceOption = "cpu",
    seed: SeedOption = None,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Merge a recipe, and tune and score the result if the recipe says so. (The default command.)"""
    say = speaker(quiet or json)
    limit = None if max_memory is None else parse_size(max_memory, "--max-memory")
    timings: dict[str, float] = {}
    check_device(device)
    if engine != "threads":
        from wemoe_plugin.merging.executor import check_engine

        check_engine(engine)
    if (whole := _whole(recipe)) is not None:
        if limit is not None or resume or engine != "threads" or jobs is not None:
            unknown = "no --max-memory, no --resume, no --engine and no --jobs"
            raise WemoeError(f"{recipe}: mergekit carries out such a recipe; it knows {unknown}")
        target = out if out is not None else Path("merged") / recipe.stem
        _merge_whole(whole, target, say, timings, force=force, device=device, shard=shard_size, seed=seed or 0)
        if json:
            print_json({"directory": str(target), "seconds": timings})
        return
    with timed(timings, "plan"):
        source, plan = _planned(recipe, shard_size, seed)
        target = out if out is not None else Path("merged") / recipe.stem
        from wemoe_plugin.checkpoints.manifest import doubt_output
        from wemoe_plugin.checkpoints.staging import check_output
        from wemoe_plugin.pipeline.merge import is_merged, merge

        done = resume and is_merged(source, plan, target, device, limit)
        if not done:
            check_output(target, force, doubt_output)
    from wemoe_plugin.merging.plan_table import summary_lines

    for line in summary_lines(plan):
        say(line)
    tuning = None if no_tune or (done and (target / "results.json").is_file()) else source.recipe.tuning
    workbench = None
    if tuning is not None:
        from wemoe_plugin.pipeline.workbench import Workbench

        with timed(timings, "data"):
            workbench = Workbench(source, device)
            workbench.check(tuning=True, scoring=True)
    if done:
        say(f"merged already: {target}")
    else:
        options: dict[str, Any] = {
            "force": force,
            "resume": resume,
            "engine": engine,
            "jobs": jobs,
            "max_memory": limit,
            "device": device,
        }
        with timed(timings, "merge"), progress_bar(plan.bytes_read, quiet or json) as progress:
            merge(source, plan, target, progress=progress, **options)
        sizes = f"{format_size(plan.bytes_read)} into {format_size(plan.bytes_written)}"
        say(f"merged {sizes} in {timings['merge']:.1f} s: {target}")
    result: dict[str, Any] = {"directory": str(target), "seconds": timings}
    if workbench is not None and tuning is not None:
        try:
            result |= _tune_and_score(target, workbench, _reseeded(tuning, seed), timings, say)
        except WemoeError as error:
            raise type(error)(f"{error}\n(the merge is complete in {target}; go on with wemoe-merge tune)") from error
    elif source.recipe.tuning is not None:
        say(f"to tune its routers: wemoe-merge tune {target}")
    if json:
        print_json(result)


@app.command("plan")
def plan_command(
    recipe: RecipeArgument,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Threads the merge would use; default all processors.")
    ] = None,
    shard_size: ShardOption = "5GB",
    measure: Annotated[
        bool, typer.Option("--measure", help="Read the task vectors: choose ranks, show what compression loses.")
    ] = False,
    device: DeviceOption = "cpu",
    json: JsonOption = False,
) -> None:
    """Show what a merge would do, from the files' headers alone (unless told to measure); nothing is written."""
    if (whole := _whole(recipe)) is not None:
        from wemoe_plugin.pipeline.handover import whole_lines

        lines = whole_lines(whole, format_size)
        if json:
            print_json({"mergekit": list(whole.keys), "models": list(whole.models)})
        else:
            typer.echo("\n".join(lines))
        return
    source, plan = _planned(recipe, shard_size)
    from wemoe_plugin.merging.memory import available_processors, peak_memory
    from wemoe_plugin.merging.plan_table import plan_json, plan_lines
    from wemoe_plugin.merging.survey import losses, settle, survey_memory

    jobs = jobs or available_processors()
    lost: list[Loss] = []
    if measure:
        check_device(device)
        plan = settle(source, plan, jobs=jobs, device=device)
        lost = losses(plan, jobs=jobs, device=device)
    peak = max(peak_memory(plan.operations, plan.dtype, jobs), survey_memory(source, plan, jobs))
    if json:
        print_json(plan_json(plan, peak, lost))
        return
    for line in plan_lines(plan, peak, jobs, format_size, lost):
        typer.echo(line)


@app.command("tune")
def tune_command(
    directory: DirectoryArgument, device: DeviceOption = "cpu", seed: SeedOption = None, quiet: QuietOption = False
) -> None:
    """Tune the routers of an output directory on its recipe's unlabeled data."""
    say = speaker(quiet)
    from wemoe_plugin.pipeline.merge import recipe_of
    from wemoe_plugin.pipeline.tune import tune_directory
    from wemoe_plugin.pipeline.workbench import Workbench
    from wemoe_plugin.recipe.schema import TuningSpec

    source = recipe_of(directory)
    spec = _reseeded(source.recipe.tuning or TuningSpec(), seed)
    workbench = Workbench(source, device)
    workbench.check(tuning=True, scoring=False)
    outcome = tune_directory(directory, workbench, spec, say=say, on_check=check_printer(say))
    tell_outcome(outcome, say)
    say(f"to score it: wemoe-merge evaluate {directory}")


@app.command("evaluate")
def evaluate_command(
    directory: DirectoryArgument, device: DeviceOption = "cpu", quiet: QuietOption = False, json: JsonOption = False
) -> None:
    """Score base, experts, static merge and merged model on the recipe's labeled data."""
    say = speaker(quiet or json)
    from wemoe_plugin.pipeline.evaluate import evaluate_directory
    from wemoe_plugin.pipeline.merge import recipe_of
    from wemoe_plugin.pipeline.workbench import Workbench

    workbench = Workbench(recipe_of(directory), device)
    workbench.check(tuning=False, scoring=True)
    scores = evaluate_directory(directory, workbench, say=say)
    tell_scores(scores, say)
    say(f"report: {directory / 'report.html'}")
    if json:
        print_json(scores.to_json())


@app.command("inspect")
def inspect_command(directory: DirectoryArgument, json: JsonOption = False) -> None:
    """Show what an output directory holds: its modules, forms, routers, parameters and bytes."""
    from wemoe_plugin.pipeline.overview import overview_lines, read_overview

    overview = read_overview(directory)
    if json:
        print_json(overview.to_json())
        return
    for line in overview_lines(overview, format_size):
        typer.echo(line)


@app.command("verify")
def verify_command(directory: DirectoryArgument, json: JsonOption = False) -> None:
    """See that an output keeps its promises, on made-up inputs; exit status 1 if it does not."""
    from wemoe_plugin.pipeline.verify import verify

    checks = verify(directory)
    if json:
        print_json([vars(check) for check in checks])
    else:
        width = max(len(check.promise) for check in checks)
        for check in checks:
            typer.echo(f"{'ok' if check.kept else 'BROKEN':<7} {check.promise:<{width}}  {check.seen}")
    if not all(check.kept for check in checks):
        raise typer.Exit(1)


@app.command("export")
def export_command(
    directory: DirectoryArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new directory.")],
    mix: Annotated[str | None, typer.Option(help="Weights of the experts, such as digits=0.7,shapes=0.3.")] = None,
    static: Annotated[bool, typer.Option("--static", help="The static merge, without task vectors.")] = False,
    peft: Annotated[bool, typer.Option("--peft", help="Each expert's low-rank vectors as a PEFT adapter.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write a plain dense checkpoint (the static merge, or one mix of the experts), or an adapter per expert."""
    if (mix is not None) + static + peft != 1:
        raise WemoeError("say what to export, one of --static, --mix NAME=NUMBER,... and --peft")
    if peft:
        from wemoe_plugin.pipeline.adapters import export_adapters

        for expert, count in export_adapters(directory, out, force=force).items():
            speaker(quiet)(f"{expert}: {count} layers: {out / expert}" if count else f"{expert}: moves nothing here")
        return
    from wemoe_plugin.pipeline.export import export, parse_mix

    changed = export(directory, out, None if mix is None else parse_mix(mix), force=force)
    speaker(quiet)(f"exported, {changed} tensors other than the static merge's: {out}")


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A torch file: .bin, .pt, .pth, .ckpt.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The new directory.")],
    like: Annotated[
        Path | None, typer.Option(help="A model directory whose configuration goes with the weights.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a torch file into safetensors, reading tensors only: no code in it is ever run."""
    from wemoe_plugin.pipeline.convert import convert

    count = convert(source, out, like, force=force)
    speaker(quiet)(f"wrote {count} tensors: {out}")


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Where to put recipe, data and results.")] = Path("wemoe-demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images, the routers and the data order.")] = 0,
    device: DeviceOption = "cpu",
    quiet: QuietOption = False,
) -> None:
    """See it work: four tiny experts become one model that keeps their accuracy. About a minute on two cores."""
    say = speaker(quiet)
    from wemoe_plugin.demo.workspace import prepare_demo

    recipe = prepare_demo(out, seed=seed, force=force, say=say)
    say(f"recipe: {recipe}\n$ wemoe-merge {recipe} --out {out / 'merged'}")
    merge_command(recipe, out=out / "merged", force=force, device=device, quiet=quiet)
    say(f"\nEverything is in {out}/: recipe.yaml, data/, models/, merged/")
    say(f'Load it: from wemoe_plugin import load_model; model = load_model("{out / "merged"}")')


def _tune_and_score(
    directory: Path, workbench: Workbench, spec: TuningSpec, timings: dict[str, float], say: Say
) -> dict[str, Any]:
    from wemoe_plugin.pipeline.evaluate import evaluate_directory
    from wemoe_plugin.pipeline.tune import tune_directory

    with timed(timings, "tune"):
        outcome = tune_directory(directory, workbench, spec, say=say, on_check=check_printer(say))
    tell_outcome(outcome, say)
    result: dict[str, Any] = {"tuning": {"best_step": outcome.best_step, "collapsed": list(outcome.collapsed)}}
    without = [name for name in workbench.tasks if name not in workbench.scored_tasks]
    if without:
        say(f"not scored, since they have no score: {', '.join(without)}")
    if workbench.scored_tasks:
        scores = evaluate_directory(directory, workbench, say=say, seconds=timings)
        result |= scores.to_json()
        tell_scores(scores, say)
        say(f"report: {directory / 'report.html'}")
    return result


def _reseeded(spec: TuningSpec, seed: int | None) -> TuningSpec:
    return spec if seed is None else spec.model_copy(update={"seed": seed})


def _whole(recipe: Path) -> WholeRecipe | None:
    from wemoe_plugin.recipe.whole import read_whole_recipe

    return read_whole_recipe(recipe)


def _merge_whole(
    recipe: WholeRecipe,
    out: Path,
    say: Say,
    timings: dict[str, float],
    *,
    force: bool,
    device: str,
    shard: str,
    seed: int,
) -> None:
    from wemoe_plugin.checkpoints.manifest import doubt_output
    from wemoe_plugin.checkpoints.staging import check_output
    from wemoe_plugin.pipeline.handover import merge_whole, whole_lines

    check_output(out, force, doubt_output)
    for line in whole_lines(recipe, format_size):
        say(line)
    with timed(timings, "merge"):
        merge_whole(recipe, out, force=force, device=device, seed=seed, shard_bytes=parse_size(shard, "--shard-size"))
    say(f"merged in {timings['merge']:.1f} s: {out}")


def _planned(recipe: Path, shard_size: str, seed: int | None = None) -> tuple[RecipeFile, MergePlan]:
    from wemoe_plugin.merging.plan import plan_merge
    from wemoe_plugin.recipe.loading import load_recipe

    source = load_recipe(recipe)
    return source, plan_merge(source, parse_size(shard_size, "--shard-size"), seed)


if __name__ == "__main__":
    main()
