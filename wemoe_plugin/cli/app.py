"""The command's group, and the options its commands share."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from wemoe_plugin.errors import WemoeError

if TYPE_CHECKING:
    from wemoe_plugin.recipe.schema import TuningSpec


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
MemoryOption = Annotated[str | None, typer.Option(help="Limit of all buffers together, such as 4GiB.")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Seed of routers and data order; default the recipe's.")]
ShardOption = Annotated[str, typer.Option(help="Largest weights file to write, such as 5GB; open_clip keeps one file.")]


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


def reseeded(spec: TuningSpec, seed: int | None) -> TuningSpec:
    """The recipe's tuning with another seed, if one is given."""
    return spec if seed is None else spec.model_copy(update={"seed": seed})
