"""The main job and its plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wemoe_plugin.cli.app import (
    DeviceOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    RecipeArgument,
    SeedOption,
    ShardOption,
    app,
    reseeded,
)
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


@app.command("merge")
def merge_command(
    recipe: RecipeArgument,
    out: Annotated[Path | None, typer.Option(help="Output directory; default merged/<recipe stem>.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a merge that was killed.")] = False,
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Merge only, even if the recipe has tuning.")] = False,
    engine: Annotated[str, typer.Option(help="Who merges: threads, or ray for the workers of a cluster.")] = "threads",
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads or workers; default all processors.")] = None,
    max_memory: MemoryOption = None,
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
        from wemoe_plugin.merging.survey import survey_bytes

        read = survey_bytes(source, plan) + plan.bytes_read
        with timed(timings, "merge"), progress_bar(read, quiet or json) as progress:
            plan = merge(source, plan, target, progress=progress, **options)
        sizes = f"{format_size(plan.bytes_read)} into {format_size(plan.bytes_written)}"
        say(f"merged {sizes} in {timings['merge']:.1f} s: {target}")
    result: dict[str, Any] = {"directory": str(target), "seconds": timings}
    if workbench is not None and tuning is not None:
        try:
            result |= _tune_and_score(target, workbench, reseeded(tuning, seed), timings, say)
        except WemoeError as error:
            raise type(error)(f"{error}\n(the merge is complete in {target}; go on with wemoe-merge tune)") from error
    elif plan.modules and not done:
        say("its routers are fresh: until they are tuned it acts as the static merge")
        if source.recipe.tasks:
            say(f"to tune them: wemoe-merge tune {target}")
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
    max_memory: MemoryOption = None,
    device: DeviceOption = "cpu",
    json: JsonOption = False,
) -> None:
    """Show what a merge would do, from the files' headers alone (unless told to measure); nothing is written."""
    if not measure and (max_memory is not None or device != "cpu"):
        raise WemoeError("--max-memory and --device are for --measure; a plan alone reads no tensor")
    limit = None if max_memory is None else parse_size(max_memory, "--max-memory")
    if (whole := _whole(recipe)) is not None:
        from wemoe_plugin.pipeline.handover import whole_lines

        if measure:
            raise WemoeError(f"{recipe}: mergekit carries out such a recipe; there are no task vectors to measure")
        lines = whole_lines(whole, format_size)
        if json:
            print_json({"mergekit": list(whole.keys), "models": list(whole.models)})
        else:
            typer.echo("\n".join(lines))
        return
    source, plan = _planned(recipe, shard_size)
    from wemoe_plugin.merging.memory import available_processors, peak_memory
    from wemoe_plugin.merging.plan_table import plan_json, plan_lines
    from wemoe_plugin.merging.survey import compressions, losses, settle, survey_bytes, survey_memory

    jobs = jobs or available_processors()
    lost: list[Loss] = []
    if measure:
        check_device(device)
        options: dict[str, Any] = {"jobs": jobs, "max_memory": limit, "device": device}
        read = survey_bytes(source, plan) + sum(s.nbytes for o in compressions(plan) for s in o.sources)
        with progress_bar(read, json, "measuring") as progress:
            plan = settle(source, plan, progress=progress, **options)
            lost = losses(plan, progress=progress, **options)
    peak = max(peak_memory(plan.operations, plan.dtype, jobs), survey_memory(source, plan, jobs))
    if json:
        print_json(plan_json(plan, peak, lost))
        return
    for line in plan_lines(plan, peak, jobs, format_size, lost):
        typer.echo(line)


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
    from wemoe_plugin.merging.planner import plan_merge
    from wemoe_plugin.recipe.loading import load_recipe

    source = load_recipe(recipe)
    return source, plan_merge(source, parse_size(shard_size, "--shard-size"), seed)
