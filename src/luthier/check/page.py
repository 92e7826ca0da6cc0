"""The findings as one page that needs nothing else: styles inside, plots as inline SVG, no script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from luthier import __version__
from luthier.check import plots
from luthier.check.findings import DataSet, Findings
from luthier.check.memory import PARTS, Memory
from luthier.check.style import STYLE
from luthier.check.text import MIXTURE, mixture_rows, size_text, time_text
from luthier.check.tokens import ShownSample, Token
from luthier.recipe.source import dump_value

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing."""


def page(found: Findings, title: str) -> str:
    """The whole page; `title` is the recipe's name. Everything that comes from outside is escaped."""
    body = "\n".join(_sections(found))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} – luthier check</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><p>luthier check {escape(__version__)}</p><h1>{escape(title)}</h1></header>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _sections(found: Findings) -> Iterator[str]:
    yield _verdict(found)
    yield _tiles(found)
    if found.memory is not None:
        yield _section("Memory", _memory(found.memory, found))
    if found.datasets:
        yield _section("Data", "".join(_dataset(dataset) for dataset in found.datasets))
    if found.mixture:
        yield _section("An epoch's samples", _table(MIXTURE, mixture_rows(found.mixture), numbers=2))
    if found.samples:
        yield _section("Samples", _LEGEND + "".join(_sample(sample) for sample in found.samples))
    if found.parameters:
        rows = [(kind, f"{one.total:,}", f"{one.trainable:,}") for kind, one in found.parameters.items()]
        yield _section("Parameters", _table(("kind", "parameters", "train"), rows, numbers=2))
    if found.schedule is not None:
        yield _section("Steps", _table((), _steps(found), numbers=1))
    if found.recipe:
        settings = [(one.key, dump_value(one.value), one.origin) for one in found.recipe]
        yield _section("Recipe", _table(("key", "value", "from"), settings))
    if found.notes:
        yield _section("Notes", f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in found.notes)}</ul>")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _verdict(found: Findings) -> str:
    if found.ok:
        return '<div class="verdict good">Nothing that <code>train</code> would refuse was found.</div>'
    items = "".join(
        f"<li><b>{escape(one.part)}</b> <span>{escape(one.message)}</span></li>" for one in found.problems
    )
    head = f"<code>train</code> would refuse this recipe ({len(found.problems)})"
    return f'<div class="verdict bad">{head}<ul>{items}</ul></div>'


def _tiles(found: Findings) -> str:
    tiles = []
    if found.parameters:
        whole = found.parameters["all"]
        tiles.append(
            ("parameters that train", f"{whole.trainable:,}", f"{whole.trainable / whole.total:.2%}")
        )
    if found.schedule is not None:
        steps = found.schedule
        tiles.append(("optimizer steps", f"{steps.steps:,}", f"{steps.tokens_per_step:,.0f} tokens each"))
    if found.memory is not None:
        fits = "fits" if found.memory.fits else "does not fit"
        there = f"{fits}: there is {size_text(found.memory.limit)}"
        tiles.append(("memory, estimated", size_text(found.memory.total), there))
    if found.probe is not None:
        per_epoch = f"{time_text(found.probe.seconds_per_epoch)} per epoch"
        tiles.append(("time of training", time_text(found.probe.seconds), per_epoch))
    if found.hardware is not None:
        tiles.append(("device", found.hardware.device, found.hardware.name))
    cells = (
        f"<div><span>{escape(name)}</span><strong>{escape(value)}</strong><small>{escape(more)}</small></div>"
        for name, value, more in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _memory(memory: Memory, found: Findings) -> str:
    parts = [(PARTS[name], size) for name, size in memory.parts.items()]
    rows = [
        (f'<i class="swatch c{place % plots.COLORS}"></i>{escape(name)}', size_text(size))
        for place, (name, size) in enumerate(parts)
    ]
    rows.append((f"<b>total, when {escape(memory.fullest)}</b>", f"<b>{size_text(memory.total)}</b>"))
    if found.probe is not None and found.probe.peak is not None:
        rows.append(("measured in the probe", size_text(found.probe.peak)))
    listed = "".join(f"<tr><td>{name}</td><td>{size}</td></tr>" for name, size in rows)
    moments = "; ".join(f"{name} {size_text(size)}" for name, size in memory.moments.items())
    bar = plots.stacked_bar([(name, size, size_text(size)) for name, size in parts], memory.limit)
    return (
        f'{bar}<table class="last">{listed}</table><p class="quiet">Moments of a run: {escape(moments)}.</p>'
    )


def _dataset(dataset: DataSet) -> str:
    report = dataset.report
    facts = [
        ("rows", report.rows),
        ("samples", report.samples),
        ("tokens", report.tokens),
        ("learnt tokens", report.targets),
        ("rows cut", report.cut_rows),
        ("tokens lost", report.cut_tokens),
        ("whole answers lost", report.lost_answers),
        ("rows without target", report.unsupervised),
    ]
    facts += [(f"dropped: {reason}", count) for reason, count in report.dropped.items()]
    listed = "".join(
        f"<div{_alarm(name, count)}><dt>{escape(name)}</dt><dd>{count:,}</dd></div>" for name, count in facts
    )
    losses = report.losses()
    warning = f'<p class="loss">{escape(losses)}</p>' if losses else ""
    return (
        f"<article><h3>{escape(report.dataset)} <small>{escape(dataset.part)}</small></h3><dl>{listed}</dl>"
        f"{warning}{plots.histogram(dataset.histogram, report.lengths)}</article>"
    )


def _alarm(name: str, count: int) -> str:
    lost = name.startswith(("dropped", "rows cut", "tokens lost", "whole", "rows without"))
    return ' class="lost"' if lost and count else ""


_LEGEND = (
    '<p class="legend tokens"><span>context</span><span class="l">learnt</span> '
    "Every box is one token; point at it for its number and weight. ↵ is a line break.</p>"
)


def _sample(sample: ShownSample) -> str:
    head = f"{escape(sample.dataset)}, row {sample.row}"
    if sample.answers:
        count = f"a prompt of {len(sample.tokens)} tokens, and its answers"
    else:
        count = f"{sample.learnt} of {len(sample.tokens)} tokens are learnt"
        count = count if sample.learnt else f"a prompt of {len(sample.tokens)} tokens"
    answers = "".join(
        f"<h4>{escape(answer.name)} <small>{len(answer.tokens)} tokens</small></h4>{_tokens(answer.tokens)}"
        for answer in sample.answers
    )
    return f"<article><h3>{head} <small>{count}</small></h3>{_tokens(sample.tokens)}{answers}</article>"


def _tokens(tokens: Sequence[Token]) -> str:
    return f'<div class="tokens">{"".join(map(_token, tokens))}</div>'


def _token(token: Token) -> str:
    label = f"{token.id}" + (f", weight {token.weight:g}" if token.learnt else "")
    style = ' class="l"' if token.learnt else ""
    broken = "<br>" * token.text.count("↵")
    return f'<span{style} title="{escape(label)}">{escape(token.text)}</span>{broken}'


def _steps(found: Findings) -> list[tuple[str, str]]:
    steps = found.schedule
    assert steps is not None
    rows = [
        ("steps in all", f"{steps.steps:,}"),
        ("steps per epoch", f"{steps.steps_per_epoch:,}"),
        ("epochs", f"{steps.epochs:.3g}"),
        ("tokens per epoch", f"{steps.tokens_per_epoch:,}"),
        (
            "tokens per step",
            f"{steps.tokens_per_step:,.0f} ({steps.least_tokens:,} to {steps.most_tokens:,})",
        ),
        ("passes per step", f"{steps.passes_per_step:.3g}"),
        ("longest pass", f"{steps.longest_pass:,} tokens"),
        ("padding", f"{steps.padding_share:.0%}"),
    ]
    if found.probe is not None:
        rows += [
            ("tokens per second, measured", f"{found.probe.tokens_per_second:,.0f}"),
            ("optimizer step", time_text(found.probe.optimizer_seconds)),
        ]
    return rows


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """A table of plain text whose last `numbers` columns are numbers."""
    first = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = {0: "plain", 1: "last", 2: "numbers"}[numbers]
    return f'<table class="{kind}">{first}{body}</table>'
