"""The verb `selfcheck`: prove the fast paths on the user's own model, data and machine.

It trains a few steps in a temporary folder and leaves nothing behind but the caches.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from luthier.environment import detect_hardware
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import resolve
from luthier.selfcheck.bench import Bench
from luthier.selfcheck.data_checks import learnt, prompts
from luthier.selfcheck.model_checks import chunked, gradients, packed, saved, shared
from luthier.selfcheck.outcome import Outcome
from luthier.selfcheck.process_check import processes
from luthier.selfcheck.resume_check import resumed
from luthier.selfcheck.rollout_checks import sampled
from luthier.selfcheck.step_checks import accumulation, mean
from luthier.show import quiet_libraries, speaker
from luthier.types import RecipeError

CHECKS: dict[str, Callable[[Bench], Outcome]] = {
    "prompts": prompts,
    "learnt": learnt,
    "packed": packed,
    "gradients": gradients,
    "shared": shared,
    "chunked": chunked,
    "mean": mean,
    "accumulation": accumulation,
    "processes": processes,
    "sampled": sampled,
    "saved": saved,
    "resumed": resumed,
}


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What was measured on which machine."""

    outcomes: tuple[Outcome, ...]
    device: str
    seconds: float

    @property
    def holds(self) -> bool:
        return all(outcome.holds for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "holds": self.holds,
            "device": self.device,
            "seconds": round(self.seconds, 1),
            "checks": [outcome.to_dict() for outcome in self.outcomes],
        }


def selfcheck(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    folder: Path | None = None,
    quiet: bool = False,
) -> SelfCheck:
    """Run the checks on a recipe and return what was measured.

    `only` names some of `CHECKS`; `folder` is where the temporary files go (room for a few copies of what is
    trained). Raises RecipeError for an unknown check, and whatever `train` raises for a recipe that it refuses.
    """
    unknown = [name for name in only if name not in CHECKS]
    if unknown:
        raise RecipeError(f"selfcheck: no check {unknown[0]!r}; choose from {', '.join(CHECKS)}")
    quiet_libraries()
    hardware = detect_hardware()
    loaded = resolve(load_recipe(recipe, overrides), hardware)
    say = speaker(quiet)
    started = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="luthier-selfcheck-", dir=folder) as place:
        bench = Bench(loaded, hardware, Path(place), say)
        for name, check in CHECKS.items():
            if only and name not in only:
                continue
            outcome = check(bench)
            outcomes.append(outcome)
            if outcome.left_out:
                say(escape(f"{outcome.claim}: left out ({outcome.detail})"))
                continue
            state = "holds" if outcome.holds else "[bold red]FAILS[/]"
            say(f"{outcome.claim}: {outcome.measured:.3g} {outcome.unit} (bound {outcome.bound:.3g}) {state}")
    return SelfCheck(tuple(outcomes), hardware.name, time.monotonic() - started)
