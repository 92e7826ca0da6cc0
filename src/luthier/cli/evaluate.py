"""The command `evaluate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.app import app
from luthier.cli.options import BaseOption


class Language(StrEnum):
    en = "en"
    zh = "zh"


class PromptLayout(StrEnum):
    chat = "chat"
    text = "text"


TargetOption = Annotated[
    str, typer.Argument(help="A run, checkpoint, adapter or model (folder), or a recipe.")
]
PerplexityOption = Annotated[
    list[str] | None,
    typer.Option("--perplexity", help="A data set by name or file; may be repeated.", show_default=False),
]
WindowOption = Annotated[
    int | None,
    typer.Option("--window", min=2, help="Tokens that a text is seen in (the run's).", show_default=False),
]
StrideOption = Annotated[
    int | None,
    typer.Option("--stride", min=1, help="Tokens between windows (half of one).", show_default=False),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task", help="A benchmark and its split, as mmlu_test; may be repeated.", show_default=False
    ),
]
TaskDirOption = Annotated[Path, typer.Option("--task-dir", help="Folder of the benchmarks.")]
NShotOption = Annotated[int, typer.Option("--n-shot", min=0, help="Examples before each question.")]
LangOption = Annotated[Language, typer.Option("--lang", help="Language of the words around.")]
LayoutOption = Annotated[PromptLayout, typer.Option("--layout", help="Turns of a conversation, or one text.")]
PairsOption = Annotated[
    list[str] | None,
    typer.Option("--pairs", help="Ranking data, for a reward model.", show_default=False),
]
LmEvalOption = Annotated[
    list[str] | None,
    typer.Option("--lm-eval", help="A task of lm-evaluation-harness; may be repeated.", show_default=False),
]
TasksFolderOption = Annotated[
    Path | None,
    typer.Option("--tasks-folder", help="Folder of task files for --lm-eval.", show_default=False),
]
LmEvalChatOption = Annotated[
    bool, typer.Option("--lm-eval-chat", help="Put their contexts into the model's chat template.")
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against", help="base (what training started from), or another model.", show_default=False
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Rows of a set, questions of a subject.", show_default=False),
]
TokensPerPassOption = Annotated[
    int | None,
    typer.Option("--tokens-per-pass", min=1, help="Of one forward pass.", show_default=False),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of evaluate_results.json.", show_default=False),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is in the way.")]
AsJsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.command()
def evaluate(
    target: TargetOption,
    perplexity: PerplexityOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    task: TaskOption = None,
    task_dir: TaskDirOption = Path("evaluation"),
    n_shot: NShotOption = 5,
    lang: LangOption = Language.en,
    layout: LayoutOption = PromptLayout.chat,
    pairs: PairsOption = None,
    lm_eval: LmEvalOption = None,
    tasks_folder: TasksFolderOption = None,
    lm_eval_chat: LmEvalChatOption = False,
    against: AgainstOption = None,
    base: BaseOption = None,
    limit: LimitOption = None,
    tokens_per_pass: TokensPerPassOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    as_json: AsJsonOption = False,
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
