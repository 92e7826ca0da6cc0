"""What the published relatives of GRPO set: one name for each paper, and the fields that it stands for.

docs/grpo_variants.md is the same table for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Variant = Literal["grpo", "dr_grpo", "dapo", "rloo", "gspo", "reinforce_pp", "cispo"]

VARIANTS: dict[str, dict[str, Any]] = {
    # Shao et al., 2024, arXiv:2402.03300, section 4.1
    "grpo": {
        "advantage": "group",
        "aggregation": "sequence",
        "ratio": "token",
        "loss": "clip",
        "clip": 0.2,
        "kl": {"coefficient": 0.04, "estimator": "k3"},
    },
    # Liu et al., 2025, arXiv:2503.20783, section 3.2
    "dr_grpo": {
        "advantage": "centered",
        "aggregation": "constant",
        "ratio": "token",
        "loss": "clip",
        "clip": 0.2,
        "kl": {"coefficient": 0.0},
    },
    # Yu et al., 2025, arXiv:2503.14476, section 3; ten rounds of sampling as in the authors' code
    "dapo": {
        "advantage": "group",
        "aggregation": "token",
        "ratio": "token",
        "loss": "clip",
        "clip": 0.2,
        "clip_high": 0.28,
        "kl": {"coefficient": 0.0},
        "mask_truncated": True,
        "dynamic_sampling": 10,
    },
    # Ahmadian et al., 2024, arXiv:2402.14740: the answer is one action
    "rloo": {
        "advantage": "rloo",
        "aggregation": "sequence",
        "ratio": "product",
        "loss": "clip",
        "clip": 0.2,
        "kl": {"coefficient": 0.0, "estimator": "k1"},
    },
    # Zheng et al., 2025, arXiv:2507.18071, section 5.1
    "gspo": {
        "advantage": "group",
        "aggregation": "sequence",
        "ratio": "sequence",
        "loss": "clip",
        "clip": 3e-4,
        "clip_high": 4e-4,
        "kl": {"coefficient": 0.0},
    },
    # Hu et al., 2025, arXiv:2501.03262, with baseline
    "reinforce_pp": {
        "advantage": "reinforce_pp",
        "aggregation": "token",
        "ratio": "token",
        "loss": "clip",
        "clip": 0.2,
        "kl": {"coefficient": 0.0, "estimator": "k2"},
    },
    # MiniMax, 2025, arXiv:2506.13585, section 3.1; the weight is cut at 5 (Khatri et al., 2025, arXiv:2510.13786)
    "cispo": {
        "advantage": "group",
        "aggregation": "token",
        "ratio": "token",
        "loss": "cispo",
        "clip_high": 4.0,
        "kl": {"coefficient": 0.0},
    },
}


def filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe's stage with those of its variant where it says nothing; `kl` field by field.

    A variant that does not exist is left for the schema to refuse.
    """
    preset = VARIANTS.get(str(given.get("variant")), {})
    merged = {**preset, **given}
    known, own = preset.get("kl"), given.get("kl")
    if isinstance(known, Mapping) and isinstance(own, Mapping):
        merged["kl"] = {**known, **own}
    return merged
