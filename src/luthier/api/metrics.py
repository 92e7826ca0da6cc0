"""Counts and durations of the server, in Prometheus' text format (exposition format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds; from a short answer on a GPU to a long one on a CPU."""


@dataclass(slots=True)
class Histogram:
    """How many durations were at most so long."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, about: str) -> Iterator[str]:
        yield from _head(name, about, "histogram")
        seen = 0
        for bound, number in zip((*map(str, _BOUNDS), "+Inf"), self.counts, strict=True):
            seen += number
            yield f'{name}_bucket{{le="{bound}"}} {seen}'
        yield f"{name}_sum {self.total}"
        yield f"{name}_count {seen}"


@dataclass(slots=True)
class Metrics:
    """What is counted since the start."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path and status."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: Histogram = field(default_factory=Histogram)
    """From a request's arrival to its last byte."""
    first_token: Histogram = field(default_factory=Histogram)
    """From a request's arrival to its first token."""

    def text(self, *, waiting: int, running: int) -> str:
        """The page of /metrics."""
        lines = [*_head("luthier_requests_total", "Requests by path and status.", "counter")]
        for (path, status), number in sorted(self.requests.items()):
            lines.append(f'luthier_requests_total{{path="{path}",status="{status}"}} {number}')
        single = (
            ("luthier_prompt_tokens_total", "Tokens of prompts.", "counter", self.prompt_tokens),
            ("luthier_completion_tokens_total", "Tokens of answers.", "counter", self.completion_tokens),
            ("luthier_requests_waiting", "Answers that wait.", "gauge", waiting),
            ("luthier_requests_running", "Answers under way.", "gauge", running),
        )
        for name, about, kind, value in single:
            lines += [*_head(name, about, kind), f"{name} {value}"]
        lines += self.seconds.lines("luthier_request_seconds", "Time of a request, to its last byte.")
        lines += self.first_token.lines(
            "luthier_first_token_seconds", "Time to the first token of a request."
        )
        return "\n".join(lines) + "\n"


def _head(name: str, about: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {about}", f"# TYPE {name} {kind}"
