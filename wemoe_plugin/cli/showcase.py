"""The demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wemoe_plugin.cli.app import DeviceOption, QuietOption, app
from wemoe_plugin.cli.merging import merge_command
from wemoe_plugin.console import speaker


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
