"""What a person sees: the text of a token sequence and which of it is learnt, and no chatter of libraries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape

from luthier.types import Sample

Say = Callable[[str], None]
"""Shows one line or table to the person who waits."""


def speaker(quiet: bool) -> Say:
    """Prints rich markup to the terminal, or nothing."""
    console = Console(soft_wrap=True)
    return (lambda text: None) if quiet else (lambda text: console.print(text, highlight=False))


def quiet_libraries() -> None:
    """Leave the terminal to the run: transformers' own progress and notices, and a warning that is for PEFT."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def example_text(sample: Sample, decode: Callable[[Sequence[int]], str]) -> str:
    """One sample as rich markup: learnt text green between brackets, context dim.

    The brackets stay where colours are lost (a log file, a pipe). The first token is never a target.
    """
    learnt = [bool(weight > 0 and index > 0) for index, weight in enumerate(sample.weights)]
    parts, start = [], 0
    for is_learnt, run in groupby(learnt):
        stop = start + len(list(run))
        text = escape(decode(sample.input_ids[start:stop].tolist()))
        parts.append(f"[bold green]⟦{text}⟧[/]" if is_learnt else f"[dim]{text}[/]")
        start = stop
    where = f"example ({escape(sample.source)}, row {sample.index})"
    return f"{where}: {sum(learnt)} of {len(sample)} tokens are learnt, in ⟦ ⟧\n{''.join(parts)}"
