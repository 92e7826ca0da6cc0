"""Plots as inline SVG; colours are classes of the page's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from luthier.check.findings import Histogram

COLORS = 8
"""Colour classes c0 to c7 of the style."""
WIDTH = 720


def stacked_bar(parts: Sequence[tuple[str, int, str]], limit: int) -> str:
    """Parts (name, size, label) one after the other; a line at the limit, unless it is so far that parts vanish."""
    total = sum(size for _, size, _ in parts)
    limited = limit <= 3 * total
    scale = (WIDTH - 2) / max(total, limit if limited else 0, 1)
    shapes, at = [], 0.0
    for place, (name, size, label) in enumerate(parts):
        width = size * scale
        tip = f"<title>{escape(name)}: {escape(label)}</title>"
        shapes.append(
            f'<rect class="c{place % COLORS}" x="{at:.2f}" y="10" width="{width:.2f}" height="34">{tip}</rect>'
        )
        at += width
    if limited:
        x = limit * scale
        shapes.append(
            f'<line class="limit" x1="{x:.2f}" y1="2" x2="{x:.2f}" y2="52"><title>what there is</title></line>'
        )
    return f'<svg class="bar" viewBox="0 0 {WIDTH} 54" role="img" aria-label="memory by part">{"".join(shapes)}</svg>'


def histogram(data: Histogram, percentiles: Mapping[str, int]) -> str:
    """Bars of sample lengths, with the percentiles marked; nothing for an empty data set."""
    if not data.counts:
        return ""
    left, top, bottom = 8, 26, 132
    low, high = data.edges[0], data.edges[-1]
    scale, most = (WIDTH - 2 * left) / (high - low), max(data.counts)
    shapes = []
    for count, start, stop in zip(data.counts, data.edges, data.edges[1:], strict=False):
        height = max((bottom - top) * count / most, 1.5 if count else 0.0)
        x, width = left + (start - low) * scale, max((stop - start) * scale - 2, 1)
        tip = f"<title>{start:,} to {stop - 1:,} tokens: {count:,} samples</title>"
        box = f'x="{x:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" height="{height:.1f}"'
        shapes.append(f'<rect class="c0" {box}>{tip}</rect>')
    for place, (name, value) in enumerate(percentiles.items()):
        x = left + (value - low + 0.5) * scale
        label = "longest" if name == "p100" else name
        anchor = "end" if x > WIDTH * 0.8 else "start"
        y = 10 + 12 * (place % 2)
        shapes.append(f'<line class="mark" x1="{x:.1f}" y1="{y + 2}" x2="{x:.1f}" y2="{bottom}"/>')
        shapes.append(
            f'<text x="{x + (4 if anchor == "start" else -4):.1f}" y="{y}" text-anchor="{anchor}">'
            f"{escape(label)} {value:,}</text>"
        )
    axis = f'<line class="axis" x1="0" y1="{bottom}" x2="{WIDTH}" y2="{bottom}"/>'
    ends = (
        f'<text x="{left}" y="{bottom + 15}">{low:,}</text>'
        f'<text x="{WIDTH - left}" y="{bottom + 15}" text-anchor="end">{high - 1:,} tokens</text>'
    )
    return (
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {bottom + 20}" role="img" aria-label="lengths of samples">'
        f"{''.join(shapes)}{axis}{ends}</svg>"
    )
