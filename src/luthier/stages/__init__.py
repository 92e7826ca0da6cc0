"""Training stages: what is learnt. One file, one stage."""

from __future__ import annotations

from luthier.data.encode import EncodeOptions
from luthier.recipe.schema import PtSpec, SftSpec
from luthier.stages.pt import Pretraining
from luthier.stages.sft import SupervisedFineTuning

STAGES: dict[str, type[Pretraining] | type[SupervisedFineTuning]] = {
    "pt": Pretraining,
    "sft": SupervisedFineTuning,
}


def build_stage(spec: PtSpec | SftSpec, options: EncodeOptions) -> Pretraining | SupervisedFineTuning:
    """The stage that a recipe's `stage` part describes."""
    return STAGES[spec.type](spec, options)  # type: ignore[arg-type]


__all__ = ["STAGES", "build_stage"]
