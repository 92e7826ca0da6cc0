"""`luthier selfcheck` of recipes that compare answers: it holds on an honest build, and planted faults fail it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.data import collate
from luthier.methods.lora import Lora
from luthier.selfcheck.outcome import table
from luthier.selfcheck.verb import CHECKS, selfcheck
from luthier.stages import pair_losses
from luthier.stages.kto import Feedback
from luthier.types import Batch
from tests.compared import FULL, LORA

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda method: str(method["type"]))
@pytest.mark.parametrize("stage", ["dpo", "kto", "rm"])
def test_everything_holds(stage: str, method: dict[str, Any], make: Make, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    recipe = {**make(stage), "method": method}
    result = selfcheck(recipe, folder=place, quiet=True)
    assert [outcome.check for outcome in result.outcomes] == list(CHECKS)
    assert result.holds, [outcome for outcome in result.outcomes if not outcome.holds]
    outcomes = {outcome.check: outcome for outcome in result.outcomes}
    left_out = {name for name, outcome in outcomes.items() if outcome.left_out}
    expected: dict[str, set[str]] = {"dpo": set(), "kto": {"shared"}, "rm": {"chunked"}}
    assert left_out == expected[stage] | {"sampled"}  # they draw no answers
    assert outcomes["prompts"].detail == outcomes["learnt"].detail == "16 rows"
    assert outcomes["resumed"].measured == 0 and "tensors" in outcomes["resumed"].detail
    assert 0 < outcomes["gradients"].measured < 1e-5
    assert outcomes["mean"].measured < 1e-5 and " against " in outcomes["mean"].detail
    assert list(place.iterdir()) == []
    if stage == "kto":
        assert outcomes["shared"].detail == "every row has a prompt of its own here"
    else:
        assert 0 < outcomes["shared"].measured < 0.1
        assert " tokens instead of " in outcomes["shared"].detail
    if stage == "rm":
        assert outcomes["chunked"].detail.startswith("a value head")


def test_a_policy_beside_its_own_copy_is_moved_away_from_it(make: Make) -> None:
    """Else every log-ratio would be 0, and a wrong reference could not be seen: the loss would be log 2 anyway."""
    recipe = make("dpo", method=FULL)
    (outcome,) = selfcheck(recipe, only=["mean"], quiet=True).outcomes
    assert outcome.holds
    assert abs(float(outcome.detail.split()[0]) - 0.693147) > 1e-3


def test_what_has_no_formula_here_is_said(make: Make) -> None:
    only = ["mean", "accumulation", "packed"]
    result = selfcheck(make("orpo"), only=only, quiet=True)
    assert result.holds
    outcomes = {outcome.check: outcome for outcome in result.outcomes}
    assert outcomes["mean"].left_out and "sigmoid alone" in outcomes["mean"].detail
    assert f"mean: {outcomes['mean'].detail}" in table(result.outcomes).splitlines()
    assert 0 < outcomes["accumulation"].measured < 1e-5


@pytest.mark.parametrize("loss", ["bco_pair", "aot", "kto_pair"])
def test_a_loss_of_the_whole_step_does_not_depend_on_its_passes(loss: str, make: Make) -> None:
    recipe = make("dpo", stage={"loss": loss})
    (outcome,) = selfcheck(recipe, only=["accumulation"], quiet=True).outcomes
    assert outcome.holds, outcome


def test_a_model_without_shared_prompts_says_why(make: Make, bloom: Path) -> None:
    recipe = make("dpo", model={"path": str(bloom)})
    (outcome,) = selfcheck(recipe, only=["shared"], quiet=True).outcomes
    assert outcome.holds and outcome.detail.startswith("rows are padded")
    (outcome,) = selfcheck(make("dpo", stage={"share_prompts": False}), only=["shared"], quiet=True).outcomes
    assert outcome.holds and "a prompt of its own" in outcome.detail


def _positions_one_too_far(patch: pytest.MonkeyPatch) -> None:
    """Branches begin one position after their prompt's end: the self-test at start has batches of its own."""
    right = collate._batch

    def shifted(segments: Any, rows: range, samples: Any) -> Batch:
        moved = [replace(one, start=one.start + (one.parent >= 0)) for one in segments]
        return right(moved, rows, samples)

    patch.setattr(collate, "_batch", shifted)


def _exchanged_parents(patch: pytest.MonkeyPatch) -> None:
    """The branches of a pair continue the prompt of the pair before it."""
    right = collate._batch

    def exchanged(segments: Any, rows: range, samples: Any) -> Batch:
        batch = right(segments, rows, samples)
        shares = batch.parent >= 0
        prompts = int((~shares).sum())
        batch.parent[shares] = (batch.parent[shares] - 1) % prompts
        return batch

    patch.setattr(collate, "_batch", exchanged)


def _rewards_of_the_policy_alone(patch: pytest.MonkeyPatch) -> None:
    """The loss forgets the reference."""
    patch.setattr(pair_losses.Answers, "log_ratio", property(lambda answers: answers.logprobs))


def _divergence_of_each_pass(patch: pytest.MonkeyPatch) -> None:
    """KTO's point of reference is that of the pass and not of the step."""
    patch.setattr(Feedback, "observe", lambda self, policy, passes, **given: {})


def _half_a_head_saved(patch: pytest.MonkeyPatch) -> None:
    right = Lora.save

    def halved(self: Lora, model: Any, folder: Path, state: Any = None) -> None:
        state = {
            name: tensor * 0.5 if ".score." in name else tensor for name, tensor in model.state_dict().items()
        }
        right(self, model, folder, state)

    patch.setattr(Lora, "save", halved)


Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, tuple[str, Plant, set[str]]] = {
    "positions one too far": ("dpo", _positions_one_too_far, {"shared", "mean"}),
    "exchanged parents": ("dpo", _exchanged_parents, {"shared", "accumulation"}),
    "exchanged parents of a reward model": ("rm", _exchanged_parents, {"shared", "accumulation"}),
    "a forgotten reference": ("dpo", _rewards_of_the_policy_alone, {"mean"}),
    "a divergence of each pass": ("kto", _divergence_of_each_pass, {"mean", "accumulation"}),
    "half a head saved": ("rm", _half_a_head_saved, {"saved"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_right_claim(
    fault: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, plant, expected = FAULTS[fault]
    plant(monkeypatch)
    only = [name for name in CHECKS if name not in ("resumed", "processes")]
    outcomes = selfcheck(make(stage), only=only, quiet=True).outcomes
    failed = {outcome.check for outcome in outcomes if not outcome.holds}
    assert failed == expected, [outcome for outcome in outcomes if not outcome.holds]
