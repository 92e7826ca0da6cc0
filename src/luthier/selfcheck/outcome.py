"""What a check measured, and how that is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from luthier.columns import aligned


@dataclass(frozen=True, slots=True)
class Outcome:
    """One claim, what was measured of it, and the bound that it must keep."""

    check: str
    claim: str
    measured: float
    bound: float
    unit: str
    detail: str = ""
    """On what it was measured, what went wrong, or why it was left out."""
    left_out: bool = False
    """Whether the claim has no meaning here, so that nothing was measured."""

    @property
    def holds(self) -> bool:
        return not math.isnan(self.measured) and self.measured <= self.bound

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("measured", "bound")}
        plain = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        return asdict(self) | plain | {"holds": self.holds}


def left_out(check: str, claim: str, reason: str) -> Outcome:
    """A claim that has no meaning here."""
    return Outcome(check, claim, 0.0, 0.0, "", reason, left_out=True)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as plain text, one line each, and the details of those that do not hold or were left out."""
    head = ("check", "claim", "measured", "bound", "")
    lines = [head]
    for one in outcomes:
        if one.left_out:
            lines.append((one.check, one.claim, "-", "-", "left out"))
            continue
        lines.append(
            (
                one.check,
                one.claim,
                f"{one.measured:.3g} {one.unit}",
                f"{one.bound:.3g}",
                "holds" if one.holds else "FAILS",
            )
        )
    return "\n".join(
        [
            aligned(lines),
            *(
                f"{one.check}: {one.detail}"
                for one in outcomes
                if one.detail and (one.left_out or not one.holds)
            ),
        ]
    )
