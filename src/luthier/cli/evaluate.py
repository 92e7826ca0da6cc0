"""The command `evaluate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.app import app


class Language(StrEnum):
    en = "en"
    zh = "zh"


class PromptLayout(StrEnum):
    chat = "chat"
    text = "text"


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A run, checkpoint, adapter or model (folder), or a recipe.")],
    perplexity: Annotated[
        list[str] | None,
        typer.Option("--perplexity", help="A data set by name or file; may be repeated.", show_default=False),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window", min=2, help="Tokens that a text is seen in (the run's).", show_default=False
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", min=1, help="Tokens between windows (half of one).", show_default=False),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="A benchmark and its split, as mmlu_test; may be repeated.", show_default=False
        ),
    ] = None,
    task_dir: Annotated[Path, typer.Option("--task-dir", help="Folder of the benchmarks.")] = Path(
        "evaluation"
    ),
    n_shot: Annotated[int, typer.Option("--n-shot", min=0, help="Examples before each question.")] = 5,
    lang: Annotated[Language, typer.Option("--lang", help="Language of the words around.")] = Language.en,
    layout: Annotated[
        PromptLayout, typer.Option("--layout", help="Turns of a conversation, or one text.")
    ] = PromptLayout.chat,
    pairs: Annotated[
        list[str] | None,
        typer.Option("--pairs", help="Ranking data, for a reward model.", show_default=False),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval", help="A task of lm-evaluation-harness; may be repeated.", show_default=False
        ),
    ] = None,
    tasks_folder: Annotated[
        Path | None,
        typer.Option("--tasks-folder", help="Folder of task files for --lm-eval.", show_default=False),
    ] = None,
    lm_eval_chat: Annotated[
        bool, typer.Option("--lm-eval-chat", help="Put their contexts into the model's chat template.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="base (what training started from), or another model.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The model below the adapter, where it moved.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Rows of a set, questions of a subject.", show_default=False),
    ] = None,
    tokens_per_pass: Annotated[
        int | None,
        typer.Option("--tokens-per-pass", min=1, help="Of one forward pass.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of evaluate_results.json.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is in the way.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure a model: perplexity, multiple-choice benchmarks, pairs; with nothing named, its run's evaluation sets.

    Intervals are of 95 %.
    """
    from luthier.evaluate_verb import evaluate as run_evaluate

    result = run_evaluate(
        target,
        perplexity=perplexity or [],
        window=window,
        stride=stride,
        tasks=task or [],
        task_dir=task_dir,
        n_shot=n_shot,
        lang=lang.value,
        layout=layout.value,
        pairs=pairs or [],
        lm_eval=lm_eval or [],
        tasks_folder=tasks_folder,
        lm_eval_chat=lm_eval_chat,
        against=against,
        base=base,
        limit=limit,
        tokens_per_pass=tokens_per_pass,
        output=output,
        overwrite=overwrite,
        quiet=as_json,
    )
    typer.echo(result.json() if as_json else result.text())
