"""What a person sees of a token sequence: the text, and which of it is learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from rich.markup import escape

from luthier.types import Sample


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
    where = f"example ({sample.source}, row {sample.index})"
    return f"{where}: {sum(learnt)} of {len(sample)} tokens are learnt, in ⟦ ⟧\n{''.join(parts)}"
