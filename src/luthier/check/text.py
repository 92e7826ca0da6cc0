"""The findings for a terminal: rich markup that says the same where colours are lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from textwrap import indent

from rich.markup import escape

from luthier.check.findings import Findings, Setting
from luthier.check.memory import PARTS, Memory
from luthier.check.mixture import Share
from luthier.check.probe import Probe
from luthier.check.schedule import Schedule
from luthier.check.tokens import ShownSample, Token
from luthier.columns import aligned
from luthier.data.report import format_reports
from luthier.methods.groups import ParameterCount
from luthier.recipe.source import dump_value
from luthier.trainer.pace import clock_text

MOST_TOKENS = 400
"""Tokens of a sample that a terminal shows; of a longer one the beginning and the end."""


MIXTURE = ("data set", "samples", "different", "there are", "share", "share of tokens")


def size_text(size: float) -> str:
    """Bytes for people."""
    for unit, width in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= width:
            return f"{size / width:.2f} {unit}" if unit == "GiB" else f"{size / width:.0f} {unit}"
    return f"{size:.0f} B"


def time_text(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.1f} s" if seconds < 60 else clock_text(seconds)


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns of plain text; the first `left` ones begin at the left, the others end at the right."""
    return indent(aligned(rows, left=left), "  ")


def report(found: Findings) -> str:
    """All findings as rich markup, the refusals last, where the eye is when the text has gone by."""
    return "\n\n".join(f"[bold]{title}[/]\n{body}" for title, body in _sections(found))


def _sections(found: Findings) -> Iterator[tuple[str, str]]:
    if found.recipe:
        yield "recipe", escape(recipe_text(found.recipe))
    if found.datasets:
        yield "data", escape(format_reports([dataset.report for dataset in found.datasets]))
    if found.mixture:
        yield "an epoch's samples", escape(table([MIXTURE, *mixture_rows(found.mixture)]))
    if found.samples:
        yield "samples", "\n\n".join(sample_text(sample) for sample in found.samples)
    if found.parameters:
        yield "parameters", escape(parameters_text(found.parameters))
    if found.schedule is not None:
        yield "steps", escape(schedule_text(found.schedule))
    if found.memory is not None:
        yield "memory, estimated", escape(memory_text(found.memory, found.probe))
    if found.schedule is not None and found.probe is not None:
        yield "time, measured", escape(probe_text(found.probe, found.schedule))
    if found.notes:
        yield "notes", escape("\n".join(f"  {note}" for note in found.notes))
    if found.ok:
        yield "[green]nothing that train would refuse was found[/]", ""
    else:
        title = f"[red]train would refuse this recipe ({len(found.problems)})[/]"
        yield (
            title,
            "\n".join(f"  {problem.part}: {_indented(problem.message)}" for problem in found.problems),
        )


def _indented(text: str) -> str:
    return escape(text.replace("\n", "\n    "))


def recipe_text(settings: Sequence[Setting]) -> str:
    return table([(one.key, dump_value(one.value), f"# {one.origin}") for one in settings], left=3)


def mixture_rows(mixture: Sequence[Share]) -> list[tuple[str, ...]]:
    """A line for each training set, under the names of `MIXTURE`."""
    return [
        (
            one.dataset,
            f"{one.samples:,}",
            f"{one.different:,}",
            f"{one.of:,}",
            f"{one.sample_share:.1%}",
            f"{one.token_share:.1%}",
        )
        for one in mixture
    ]


def sample_text(sample: ShownSample) -> str:
    """Tokens between bars; learnt ones green between brackets, with their weight where it is not 1. A prompt that
    answers continue stands once, and each answer under its name."""
    where = f"  {escape(sample.dataset)}, row {sample.row}"
    if not sample.answers:
        counts = f"{sample.learnt} of {len(sample.tokens)} tokens are learnt, in ⟦ ⟧"
        counts = counts if sample.learnt else f"a prompt of {len(sample.tokens)} tokens"
        return f"{where}: {counts}\n{_clipped(sample.tokens, MOST_TOKENS)}"
    most = MOST_TOKENS // (1 + len(sample.answers))
    parts = [
        f"{where}: a prompt of {len(sample.tokens)} tokens, answers in ⟦ ⟧\n{_clipped(sample.tokens, most)}"
    ]
    for answer in sample.answers:
        head = f"  {answer.name}, {len(answer.tokens)} tokens"
        parts.append(f"{head}\n{_clipped(answer.tokens, most)}")
    return "\n".join(parts)


def _clipped(tokens: Sequence[Token], most: int) -> str:
    """All tokens; of more than `most` the beginning and the end."""
    if len(tokens) <= most:
        return _marked(tokens)
    first, last = tokens[: most * 2 // 3], tokens[-(most // 3) :]
    hidden = len(tokens) - len(first) - len(last)
    return f"{_marked(first)}\n  … {hidden} more tokens …\n{_marked(last)}"


def _marked(tokens: Sequence[Token]) -> str:
    parts = []
    for weight, run in groupby(tokens, key=lambda token: token.weight):
        text = "|".join(_broken(token.text) for token in run)
        if not weight:
            parts.append(f"[dim]{text}[/]")
        else:
            note = "" if weight == 1 else f"×{weight:g}"
            parts.append(f"[bold green]⟦{text}⟧{note}[/]")
    text = "|".join(parts)
    return f"{text.removesuffix(_BREAK)}[/]" if text.endswith(_BREAK) else text


_BREAK = "\n[/]"
"""The end of a context that ends with a line break: what comes next begins a line anyway."""


def _broken(text: str) -> str:
    """A sign for a line break is followed by one."""
    return escape(text).replace("↵", "↵\n")


def parameters_text(parameters: dict[str, ParameterCount]) -> str:
    rows = [("kind", "parameters", "train")]
    rows += [(kind, f"{count.total:,}", f"{count.trainable:,}") for kind, count in parameters.items()]
    whole = parameters["all"]
    return f"{table(rows)}\n  {whole.trainable / whole.total:.2%} of the parameters train"


def schedule_text(schedule: Schedule) -> str:
    return table(
        [
            (
                "steps",
                f"{schedule.steps:,} ({schedule.steps_per_epoch:,} per epoch, {schedule.epochs:.3g} epochs)",
            ),
            (
                "tokens per step",
                f"{schedule.tokens_per_step:,.0f} ({schedule.least_tokens:,} to {schedule.most_tokens:,})",
            ),
            ("tokens per epoch", f"{schedule.tokens_per_epoch:,}"),
            ("passes per step", f"{schedule.passes_per_step:.3g}"),
            ("longest pass", f"{schedule.longest_pass:,} tokens"),
            ("padding", f"{schedule.padding_share:.0%}"),
        ],
        left=2,
    )


def memory_text(memory: Memory, probe: Probe | None) -> str:
    rows = [(PARTS[name], size_text(size)) for name, size in memory.parts.items()]
    rows.append((f"total (when {memory.fullest})", size_text(memory.total)))
    rows.append(("there is", size_text(memory.limit)))
    if probe is not None and probe.peak is not None:
        rows.append(("measured in the probe", size_text(probe.peak)))
    verdict = "it fits" if memory.fits else "IT DOES NOT FIT: give a smaller train.tokens_per_pass or model"
    return f"{table(rows)}\n  {verdict}"


def probe_text(probe: Probe, schedule: Schedule) -> str:
    return table(
        [
            (
                "tokens per second",
                f"{probe.tokens_per_second:,.0f} ({probe.passes} passes, {probe.tokens:,} tokens)",
            ),
            ("optimizer step", time_text(probe.optimizer_seconds)),
            ("one epoch", time_text(probe.seconds_per_epoch)),
            (f"all {schedule.steps:,} steps", time_text(probe.seconds)),
        ],
        left=2,
    )
