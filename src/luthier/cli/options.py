"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from luthier.types import RecipeError

RecipeArgument = Annotated[Path, typer.Argument(help="A Luthier or LLaMA-Factory recipe (YAML or JSON).")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="KEY=VALUE, for example train.epochs=2.", show_default=False)
]
AnsweringArgument = Annotated[
    str,
    typer.Argument(
        help="A run, checkpoint, adapter, export or model (folder or hub name), a recipe, or embedded."
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="NAME=FOLDER of one more adapter on the same base; may be repeated.",
        show_default=False,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="The model below the adapter, where it moved.", show_default=False),
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", help="Of a model that has none of its own.", show_default=False),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="As cpu or cuda:1.", show_default=False)]
EngineOption = Annotated[
    Literal["hf", "vllm"] | None,
    typer.Option(
        "--engine", help="hf, or vllm where it is installed (generation.engine).", show_default=False
    ),
]

ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--processes",
        metavar="N",
        help="Processes on each machine (parallel.processes); default: one for each visible GPU.",
        show_default=False,
    ),
]
NodesOption = Annotated[
    int | None,
    typer.Option("--nodes", metavar="N", help="Machines (parallel.nodes).", show_default=False),
]

AccelerateOption = Annotated[
    Path | None,
    typer.Option(
        "--accelerate",
        metavar="FILE",
        help="An accelerate config file, as `parallel:` of the recipe.",
        show_default=False,
    ),
]


def accelerate_words(file: Path | None) -> list[str]:
    """The overrides that an accelerate config file stands for; its notes are told on stderr."""
    if file is None:
        return []
    from luthier.recipe.sharding_keys import accelerate_overrides

    words, notes = accelerate_overrides(file)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    return words


def parallel_words(processes: int | None, nodes: int | None) -> list[str]:
    """The overrides that these options stand for."""
    given = {"processes": processes, "nodes": nodes}
    return [f"parallel.{name}={value}" for name, value in given.items() if value is not None]


def named_folders(words: list[str]) -> dict[str, str]:
    """NAME=FOLDER, each name once. Raises RecipeError."""
    named: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not folder or name in named:
            raise RecipeError(f"--adapter {word}: write NAME=FOLDER, each name once")
        named[name] = folder
    return named
