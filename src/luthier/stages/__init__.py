"""Training stages: what is learnt. One file, one stage."""

from __future__ import annotations

from collections.abc import Callable

from luthier.data.encode import EncodeOptions
from luthier.experience import OnlineStage
from luthier.recipe.online import GrpoSpec, OnlineSpec, PpoSpec
from luthier.recipe.schema import DpoSpec, KtoSpec, PtSpec, RmSpec, SftSpec
from luthier.stages.dpo import PreferencePairs
from luthier.stages.grpo import GroupRelative
from luthier.stages.kto import Feedback
from luthier.stages.ppo import Proximal
from luthier.stages.pt import Pretraining
from luthier.stages.rm import RewardModelling
from luthier.stages.sft import SupervisedFineTuning
from luthier.types import Stage

ONLINE: dict[str, Callable[..., OnlineStage]] = {"ppo": Proximal, "grpo": GroupRelative}
"""Those that learn from answers of their own."""

STAGES: dict[str, Callable[..., Stage]] = {
    "pt": Pretraining,
    "sft": SupervisedFineTuning,
    "dpo": PreferencePairs,
    "kto": Feedback,
    "rm": RewardModelling,
    **ONLINE,
}


def build_stage(
    spec: PtSpec | SftSpec | RmSpec | DpoSpec | KtoSpec | PpoSpec | GrpoSpec,
    options: EncodeOptions,
    *,
    share_prompts: bool = False,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
) -> Stage:
    """The stage that a recipe's `stage` part describes; `share_prompts` where the model computes one for several
    answers (`model.logprobs.chosen_rows`).

    ppo and grpo are `experience.OnlineStage`s: `temperature` is that of their answers, `max_new_tokens` the longest
    that one may be.
    """
    if isinstance(spec, OnlineSpec):
        return ONLINE[spec.type](
            spec,
            options,
            share_prompts=share_prompts,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        )
    return STAGES[spec.type](spec, options, share_prompts=share_prompts)


__all__ = ["ONLINE", "STAGES", "build_stage"]
