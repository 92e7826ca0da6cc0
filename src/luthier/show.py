"""What a person sees: the text of a token sequence and which of it is learnt, and no chatter of libraries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise

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
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)


def answer_titles(sample: Sample) -> tuple[str, ...]:
    """What a row of data calls the answers of its sample, in their order; nothing for a single sequence."""
    if len(sample.branches) == 1:
        return ("desirable" if sample.label > 0 else "undesirable",)
    return ("chosen", "rejected") if sample.branches else ()


def answer_bounds(sample: Sample) -> list[tuple[int, int]]:
    """The tokens [start, stop) of each answer of a sample with branches."""
    return list(pairwise((*sample.branches, len(sample)))) if sample.branches else []


def example_text(sample: Sample, decode: Callable[[Sequence[int]], str]) -> str:
    """One sample as rich markup: learnt text green between brackets, context dim; a prompt once, then each answer.

    The brackets stay where colours are lost (a log file, a pipe). The first token is never a target.
    """
    where = f"example ({escape(sample.source)}, row {sample.index})"
    if not sample.branches:
        num_learnt = int((sample.weights[1:] > 0).sum())
        text = _marked_text(sample, 0, len(sample), decode)
        if not sample.weights.any():
            return f"{where}: a prompt of {len(sample)} tokens\n{text}"
        return f"{where}: {num_learnt} of {len(sample)} tokens are learnt, in ⟦ ⟧\n{text}"
    prompt = _marked_text(sample, 0, sample.branches[0], decode)
    if prompt.endswith("\n[/]"):  # the answer's title begins a line anyway
        prompt = prompt.removesuffix("\n[/]") + "[/]"
    parts = [f"{where}: a prompt of {sample.branches[0]} tokens, answers in ⟦ ⟧", prompt]
    for title, (start, stop) in zip(answer_titles(sample), answer_bounds(sample), strict=True):
        parts += [f"{title}, {stop - start} tokens:", _marked_text(sample, start, stop, decode)]
    return "\n".join(parts)


def _marked_text(sample: Sample, first: int, last: int, decode: Callable[[Sequence[int]], str]) -> str:
    """The text of tokens [first, last)."""
    learnt = [bool(sample.weights[index] > 0 and index > 0) for index in range(first, last)]
    parts, start = [], first
    for is_learnt, run in groupby(learnt):
        stop = start + len(list(run))
        text = escape(decode(sample.input_ids[start:stop].tolist()))
        parts.append(f"[bold green]⟦{text}⟧[/]" if is_learnt else f"[dim]{text}[/]")
        start = stop
    return "".join(parts)
