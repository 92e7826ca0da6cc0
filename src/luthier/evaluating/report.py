"""What an evaluation found, as a table to read: made of the same tree that evaluate_results.json has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.columns import aligned

Tree = Mapping[str, Any]
Line = tuple[str, ...]


def text(report: Tree) -> str:
    """Tables of everything in the report; intervals are of 95 %."""
    parts = [
        *([_likelihoods(report)] if report["perplexity"] else []),
        *(_benchmark(one, report) for one in report["benchmarks"]),
        *([_pairs(report)] if report["pairs"] else []),
        *([_harness(report)] if report["lm_eval"] else []),
    ]
    return "\n\n".join(parts)


def _names(report: Tree) -> dict[str, str]:
    sides = {"target": str(report["target"]), "against": str(report["against"])}
    return sides if report["against"] is not None else {"target": sides["target"]}


def _likelihoods(report: Tree) -> str:
    lines: list[Line] = [("data set", "model", "rows", "tokens", "loss", "perplexity", "bits/byte")]
    for one in report["perplexity"]:
        for side, label in _names(report).items():
            found = one[side]
            lines.append(
                (
                    one["name"] if side == "target" else "",
                    label,
                    f"{found['rows']:,}",
                    f"{found['tokens']:,}",
                    _number(found["loss"], found["loss_interval"]),
                    _number(found["perplexity"], found["perplexity_interval"]),
                    f"{found['bits_per_byte']:.4f}" if "bits_per_byte" in found else "",
                )
            )
        if (apart := one.get("difference")) is not None:
            shown = _number(apart["value"], apart["interval"], signed=True)
            lines.append(("", f"difference, {apart['unit']}", "", "", shown, "", ""))
        left_out = one["target"].get("left_out", {})
        lines += [("", f"left out: {count:,} rows, {why}", *[""] * 5) for why, count in left_out.items()]
    return aligned(lines)


def _benchmark(one: Tree, report: Tree) -> str:
    target, sides = one["target"], _names(report)
    title = f"{one['task']}, {target['n_shot']}-shot, {target['lang']}, {target['layout']}"
    lines: list[Line] = [(title, "questions", *sides.values(), *(["difference"] if len(sides) > 1 else []))]

    def line(label: str, *path: str, apart: Tree | None = None) -> Line:
        found = []
        for side in sides:
            tree = one[side]
            for key in path:
                tree = tree[key]
            found.append(tree)
        shares = [_share(tree["accuracy"], tree["interval"]) for tree in found]
        shown = [] if len(sides) == 1 else ["" if apart is None else _share(**_of(apart), signed=True)]
        return (label, f"{found[0]['questions']:,}", *shares, *shown)

    apart = one.get("difference")
    for category in target["categories"]:
        for subject, tree in target["subjects"].items():
            if tree["category"] == category:
                lines.append(line(f"    {subject}", "subjects", subject))
        part = None if apart is None else apart["categories"][category]
        lines.append(line(f"  {category}", "categories", category, apart=part))
    lines.append(line("average", "average", apart=None if apart is None else apart["average"]))
    note = target["shots_left_out"]
    return aligned(lines) + (f"\nleft out: {note:,} examples that did not fit the context" if note else "")


def _of(apart: Tree) -> dict[str, Any]:
    return {"value": apart["value"], "interval": apart["interval"]}


def _pairs(report: Tree) -> str:
    lines: list[Line] = [("pairs", "model", "rows", "accuracy", "mean margin")]
    for one in report["pairs"]:
        for side, label in _names(report).items():
            found = one[side]
            share = _share(found["accuracy"], found["interval"])
            name = one["name"] if side == "target" else ""
            lines.append((name, label, f"{found['rows']:,}", share, f"{found['mean_margin']:.4f}"))
        if (apart := one.get("difference")) is not None:
            lines.append(("", "difference", "", _share(**_of(apart), signed=True), ""))
        if one["target"]["not_scored"]:
            lines.append(("", f"left out: {one['target']['not_scored']:,} rows", "", "", ""))
    return aligned(lines)


def _harness(report: Tree) -> str:
    sides = _names(report)
    lines: list[Line] = [("lm-eval task", "metric", *sides.values())]
    for task, metrics in report["lm_eval"]["target"].items():
        for k, metric in enumerate(metrics):
            values = [report["lm_eval"][side][task][metric] for side in sides]
            lines.append(("" if k else task, metric, *(_with_error(value) for value in values)))
    return aligned(lines)


def _with_error(found: Tree) -> str:
    value, error = found["value"], found["stderr"]
    shown = f"{value:.4f}" if isinstance(value, float) else str(value)
    return shown if error is None else f"{shown} ± {error:.4f}"


def _number(value: float, interval: Sequence[float] | None, *, signed: bool = False) -> str:
    form = "+.4g" if signed else ".4g"
    return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def _share(value: float | None, interval: Sequence[float] | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    form = "+.1f" if signed else ".1f"
    shown = f"{100 * value:{form}} %"
    return shown + (f" [{100 * interval[0]:{form}}, {100 * interval[1]:{form}}]" if interval else "")
