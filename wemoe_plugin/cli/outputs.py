"""Commands that look at outputs, tune them, and turn them into other things."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wemoe_plugin.cli.app import DeviceOption, DirectoryArgument, JsonOption, QuietOption, SeedOption, app, reseeded
from wemoe_plugin.console import check_printer, format_size, print_json, speaker, tell_outcome, tell_scores
from wemoe_plugin.errors import WemoeError


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
    spec = reseeded(source.recipe.tuning or TuningSpec(), seed)
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
    what = "the static merge" if static else f"a mix; {changed} tensors are not those of the static merge"
    speaker(quiet)(f"exported {what}: {out}")


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
