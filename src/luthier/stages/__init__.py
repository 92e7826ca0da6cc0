"""Training stages: what is learnt. One file, one stage."""

from __future__ import annotations

from collections.abc import Callable

from luthier.data.encode import EncodeOptions
from luthier.recipe.schema import DpoSpec, KtoSpec, PtSpec, RmSpec, SftSpec
from luthier.stages.dpo import PreferencePairs
from luthier.stages.kto import Feedback
from luthier.stages.pt import Pretraining
from luthier.stages.rm import RewardModelling
from luthier.stages.sft import SupervisedFineTuning
from luthier.types import Stage

STAGES: dict[str, Callable[..., Stage]] = {
    "pt": Pretraining,
    "sft": SupervisedFineTuning,
    "dpo": PreferencePairs,
    "kto": Feedback,
    "rm": RewardModelling,
}


def build_stage(
    spec: PtSpec | SftSpec | RmSpec | DpoSpec | KtoSpec,
    options: EncodeOptions,
    *,
    share_prompts: bool = False,
) -> Stage:
    """The stage that a recipe's `stage` part describes; `share_prompts` where the model computes one for several
    answers (`model.logprobs.chosen_rows`)."""
    return STAGES[spec.type](spec, options, share_prompts=share_prompts)


__all__ = ["STAGES", "build_stage"]
