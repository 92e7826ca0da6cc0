"""The command that prints what starts a run elsewhere."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from luthier.cli.app import app
from luthier.cli.options import (
    AccelerateOption,
    NodesOption,
    OverridesArgument,
    ProcessesOption,
    RecipeArgument,
    accelerate_words,
    parallel_words,
)


@app.command()
def launch(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    kind: Annotated[
        Literal["torchrun", "slurm", "kubernetes", "skypilot"],
        typer.Option("--print", help="What to write: commands, a script or a manifest."),
    ] = "torchrun",
    processes: ProcessesOption = None,
    nodes: NodesOption = None,
    accelerate: AccelerateOption = None,
    port: Annotated[int, typer.Option("--port", help="Where the machines meet.")] = 29500,
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="SkyPilot's name of the GPUs.")] = "H100",
    cpu: Annotated[bool, typer.Option("--cpu", help="Ask for no GPUs.")] = False,
    image: Annotated[
        str, typer.Option("--image", metavar="IMAGE", help="Of the container, for Kubernetes.")
    ] = "IMAGE",
    claim: Annotated[
        str, typer.Option("--claim", metavar="CLAIM", help="The shared volume's claim, for Kubernetes.")
    ] = "CLAIM",
) -> None:
    """Print what starts RECIPE with many processes, on this machine or others. It starts nothing."""
    from luthier.launch.commands import PRINTERS, Start
    from luthier.recipe.load import load_recipe

    words = [*accelerate_words(accelerate), *(overrides or [])]
    loaded = load_recipe(recipe, [*words, *parallel_words(processes, nodes)])
    start = Start(loaded.recipe, str(recipe), words, port, None if cpu else gpu, image, claim)
    typer.echo(PRINTERS[kind](start), nl=False)
