"""The stages that learn from answers of their own: PPO and GRPO, their rewards, and how they are held to a reference.

What concerns one part alone is checked here; what concerns several parts of a recipe, in `online_rules`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from luthier.recipe.base import Spec
from luthier.recipe.grpo_variants import Variant, filled
from luthier.recipe.quantization import QuantizationSpec
from luthier.recipe.reference import Reference, is_precomputed


class _Weighted(Spec):
    type: str
    weight: float = 1.0
    """Of this reward in the sum; negative for a penalty."""
    name: str | None = None
    """In logs; absent, its type or the function's own name, numbered from the second on that has it."""

    @field_validator("name")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.-]+", value):
            raise ValueError(f"write one word of letters, digits and _ . -, found the text {value!r}")
        return value

    @property
    def kind(self) -> str:
        """What it is called where the recipe gives no name."""
        return self.type


class ModelRewardSpec(_Weighted):
    """The score of a reward model: a run of stage rm, or any sequence classifier with one label."""

    type: Literal["model"] = "model"
    path: str
    """A folder or hub name; of an adapter, one with a value head."""
    base: str | None = None
    """Of an adapter: the model below it, where it is not what its run says. The policy's own base is shared."""
    quantization: QuantizationSpec | None = None


class HttpRewardSpec(_Weighted):
    """A service that is asked with {"model", "messages"} and answers {"scores"}, one for each conversation."""

    type: Literal["http"] = "http"
    url: str
    model: str = "model"
    """What the service is told under `model`."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for each try."""
    retries: int = Field(default=3, ge=0)
    """More tries after a connection that fails or is too slow, and after the states 429 and 5xx."""
    headers: dict[str, str] = {}
    """Of each request, beside Content-Type. `${NAME}` in a value stands for a variable of the environment."""
    form: Literal["messages", "text"] = "messages"
    """What a conversation is sent as: a list of {role, content}, or the text of its tokens, as LLaMA-Factory does."""

    @field_validator("url")
    @classmethod
    def _whole_address(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^/\s]\S*", value):
            raise ValueError(f"write the whole address, http://... or https://..., found the text {value!r}")
        return value


class FunctionRewardSpec(_Weighted):
    """A Python function of yours: reward(prompt, completion, row) -> float."""

    type: Literal["function"] = "function"
    path: str
    """`package.module:name` or `file.py:name`."""

    @field_validator("path")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        module, colon, function = value.rpartition(":")
        if not (module and colon and function.isidentifier()):
            raise ValueError(f"write package.module:name or file.py:name, found the text {value!r}")
        return value

    @property
    def kind(self) -> str:
        return self.path.rpartition(":")[2]


class ExactMatchSpec(_Weighted):
    """1 where the answer is the row's answer, spaces at the ends aside."""

    type: Literal["exact_match"] = "exact_match"
    column: str | None = None
    """Where the row has its answer; absent, what the data set's format says is the answer."""
    ignore_case: bool = False


class NumericSpec(_Weighted):
    """1 where the last number of the answer is the last number of the row's answer."""

    type: Literal["numeric"] = "numeric"
    column: str | None = None
    tolerance: float = Field(default=0.0, ge=0)


class RegexSpec(_Weighted):
    """1 where the whole answer, or a part of it, matches a regular expression."""

    type: Literal["regex"] = "regex"
    pattern: str
    whole: bool = True
    """Match the whole answer; false: find it anywhere."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        return value


class LengthSpec(_Weighted):
    """How near the answer's length in tokens is to what is wanted: 0 from `least` to `most`, down to -1 at `slack`
    tokens outside."""

    type: Literal["length"] = "length"
    least: int = Field(default=0, ge=0)
    most: int | None = Field(default=None, gt=0)
    slack: int = Field(default=64, gt=0)

    @model_validator(mode="after")
    def _a_range(self) -> LengthSpec:
        if self.most is None and not self.least:
            raise ValueError("every length would earn the same: give least, most or both")
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most ({self.most}) is below least ({self.least})")
        return self


class ReasoningGymSpec(_Weighted):
    """The verifier of a reasoning-gym task, for rows that it made (their `metadata` names the task)."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    task: str | None = None


class MathVerifySpec(_Weighted):
    """1 where math-verify takes the answer for equal to the row's."""

    type: Literal["math_verify"] = "math_verify"
    column: str | None = None


RewardSpec = Annotated[
    ModelRewardSpec
    | HttpRewardSpec
    | FunctionRewardSpec
    | ExactMatchSpec
    | NumericSpec
    | RegexSpec
    | LengthSpec
    | ReasoningGymSpec
    | MathVerifySpec,
    Field(discriminator="type"),
]


def reward_names(rewards: Sequence[RewardSpec]) -> tuple[str, ...]:
    """What each is called in logs, in samples.jsonl and in messages: its name in the recipe, else the function's own or
    its type, numbered where that is taken."""
    given = [reward.name for reward in rewards if reward.name is not None]
    names: list[str] = []
    for reward in rewards:
        numbered = (f"{reward.kind}_{number}" for number in range(2, 2 * len(rewards) + 2))
        free = (name for name in (reward.kind, *numbered) if name not in (*names, *given))
        names.append(reward.name or next(free))
    return tuple(names)


class KlSpec(Spec):
    """How the policy is held to the reference."""

    coefficient: float = Field(default=0.0, ge=0)
    """0: not at all, and no reference is kept."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the divergence from samples (Schulman, 2020), with r = reference / policy: -log r, (log r)^2 / 2,
    r - 1 - log r."""
    target: float | None = Field(default=None, gt=0)
    """Adapt the coefficient to this divergence per answer (Ziegler et al., 2019, arXiv:1909.08593)."""
    horizon: int = Field(default=10_000, gt=0)
    """Of adapting: answers in which the coefficient may change by a factor e^0.2."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_adapts_zero(cls, given: Any) -> Any:
        """A coefficient of 0 takes the default target with it."""
        if isinstance(given, dict) and given.get("coefficient") in (0, 0.0) and "target" not in given:
            return given | {"target": None}
        return given

    @model_validator(mode="after")
    def _options_of_a_penalty(self) -> KlSpec:
        if self.target is not None and not self.coefficient:
            raise ValueError(
                "stage.kl.target has no effect with stage.kl.coefficient: 0; give a coefficient above 0"
            )
        return self


class RewardKlSpec(KlSpec):
    """The penalty of PPO, in the reward of each token; by default adapted, as Ziegler et al. do."""

    coefficient: float = Field(default=0.2, ge=0)
    """0: not at all, and no reference is kept."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of the divergence from samples (Schulman, 2020), with r = reference / policy: -log r, (log r)^2 / 2,
    r - 1 - log r."""
    target: float | None = Field(default=6.0, gt=0)
    """Adapt the coefficient to this divergence per answer; null keeps it fixed."""


class OnlineSpec(Spec):
    """What ppo and grpo have in common."""

    type: str
    rewards: tuple[RewardSpec, ...]
    prompts_per_rollout: int = Field(default=8, gt=0)
    """Prompts that are answered before the policy is updated, all processes together."""
    epochs: int = Field(default=1, gt=0)
    """How often each rollout is gone through."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer steps of each time; each takes its share of the prompts, with all their answers."""
    clip: float = Field(default=0.2, gt=0)
    """How far a probability ratio may leave 1 before it earns nothing more."""
    clip_high: float | None = Field(default=None, gt=0)
    """Upwards, where that is another distance (DAPO, arXiv:2503.14476)."""
    entropy: float = Field(default=0.0, ge=0)
    """Weight of the entropy, which is made larger."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Weigh each token by the ratio of the policy before the update to what the engine sampled from, at most this."""
    mask_truncated: bool = False
    """Learn nothing from answers that were cut by the limit of tokens."""
    target_kl: float | None = Field(default=None, gt=0)
    """Leave out the rest of a rollout's steps once the policy is this far from where they began."""
    reference: Reference = "start"
    kl: KlSpec = KlSpec()
    samples_every: int | None = Field(default=10, gt=0)
    """Rollouts between entries of samples.jsonl; null for none."""
    max_samples: int = Field(default=8, gt=0)
    """Answers of each entry."""

    @property
    def updates(self) -> int:
        """Optimizer steps of each rollout."""
        return self.epochs * self.minibatches

    @model_validator(mode="after")
    def _live_reference(self) -> OnlineSpec:
        if is_precomputed(self.reference):
            raise ValueError(
                "stage.reference: the answers do not exist in advance, so nothing can be precomputed; leave it out"
            )
        if self.reference != "start" and not self.kl.coefficient:
            raise ValueError(
                "stage.reference has no effect with stage.kl.coefficient: 0, which keeps no reference; leave it out or "
                "give a coefficient"
            )
        return self

    @model_validator(mode="after")
    def _rewards_apart(self) -> OnlineSpec:
        if not self.rewards:
            raise ValueError("stage.rewards is empty: name at least one reward")
        names = Counter(reward.name for reward in self.rewards if reward.name is not None)
        twins = [name for name, number in names.items() if number > 1]
        if twins:
            raise ValueError(
                f"stage.rewards: two are called {twins[0]!r}, and logs could not tell them apart; rename one"
            )
        if not any(reward.weight for reward in self.rewards):
            raise ValueError(
                "stage.rewards: every weight is 0, so nothing would be learnt; give one another weight"
            )
        return self

    @model_validator(mode="after")
    def _steps_of_a_rollout(self) -> OnlineSpec:
        if self.minibatches > self.prompts_per_rollout:
            raise ValueError(
                f"stage.minibatches: {self.minibatches} steps cannot share {self.prompts_per_rollout} prompts; give at "
                "most stage.prompts_per_rollout"
            )
        if self.target_kl is not None and self.updates == 1:
            raise ValueError(
                "stage.target_kl leaves out later steps of a rollout, and with stage.epochs: 1 and "
                "stage.minibatches: 1 there is one; leave it out"
            )
        return self


class PpoSpec(OnlineSpec):
    """Proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347; for language, arXiv:2203.02155)."""

    type: Literal["ppo"] = "ppo"
    epochs: int = Field(default=4, gt=0)
    kl: RewardKlSpec = RewardKlSpec()
    """In the reward of each token."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """gamma."""
    trace: float = Field(default=0.95, ge=0, le=1)
    """lambda of generalised advantage estimation (arXiv:1506.02438)."""
    value_weight: float = Field(default=0.1, gt=0)
    """Of the value loss."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far a value may leave what it was before it earns nothing more; null: not clipped."""
    critic: Literal["shared", "own"] = "shared"
    """A value head on the policy's trunk, or a trunk of its own (an adapter on the same base, where there are
    adapters)."""
    value_start: str | None = None
    """A reward model (a run of stage rm) whose value head the critic starts from, and one of its own the trunk too."""
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    """Bring the rewards of tokens to variance 1 around their mean."""
    score_norm: bool = False
    """Divide scores by their running standard deviation, less the running mean."""
    score_clip: float | None = Field(default=None, gt=0)
    """Cut scores at so many of the units that they have then."""
    missing_end_penalty: float | None = Field(default=None, ge=0)
    """Taken off the score of an answer without its end."""


class GrpoSpec(OnlineSpec):
    """Group-relative policy optimisation (Shao et al., 2024, arXiv:2402.03300) and its relatives."""

    type: Literal["grpo"] = "grpo"
    variant: Variant | None = None
    """A paper's name for the fields that it sets (docs/grpo_variants.md); what the recipe says itself holds."""
    group_size: int = Field(default=8, ge=2)
    """Answers to each prompt."""
    advantage: Literal["group", "centered", "rloo", "batch", "reinforce_pp"] = "group"
    """Reward less the group's mean, divided by its standard deviation; not divided (dr_grpo); less the mean of the
    others (rloo, arXiv:2402.14740); less the group's mean, divided by the deviation of all rewards of the rollout
    (batch, arXiv:2508.08221), or by that of what is left of them (reinforce++ with baseline, arXiv:2501.03262)."""
    aggregation: Literal["sequence", "token", "constant"] = "token"
    """How tokens are added: the mean of each answer's mean (grpo), the mean of all tokens (dapo), or all tokens
    divided by answers times the longest that they may be (dr_grpo, arXiv:2503.20783)."""
    ratio: Literal["token", "sequence", "product"] = "token"
    """Whose probability ratio is clipped: each token's, the answer's by its length (gspo, arXiv:2507.18071), or the
    answer's as one action (rloo)."""
    loss: Literal["clip", "cispo"] = "clip"
    """The clipped surrogate, or REINFORCE with a clipped weight (arXiv:2506.13585)."""
    kl: KlSpec = KlSpec()
    """In the loss of each token. Off unless the coefficient is given, by the recipe or the variant."""
    kl_correction: bool = False
    """Multiply each token's estimate by its ratio, so that its gradient is that of the divergence itself, off-policy
    too (DeepSeek-V3.2, arXiv:2512.02556, section 3.1)."""
    dynamic_sampling: int = Field(default=0, ge=0)
    """Rounds in which groups of equal rewards are replaced by other prompts' (DAPO)."""
    share_prompts: bool = True
    """Compute the prompt of a group once, where the model allows it."""

    @model_validator(mode="before")
    @classmethod
    def _of_variant(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if isinstance(
            rewards := given.get("rewards"), list
        ):  # JSON's lists are Python's once they come by here
            given = {**given, "rewards": tuple(rewards)}
        own, kl = given.get("kl"), filled(given).get("kl")
        if isinstance(own, dict) and own and "coefficient" not in own and not (kl or {}).get("coefficient"):
            raise ValueError(
                f"stage.kl.{next(iter(own))} has no effect with stage.kl.coefficient: 0, its default here; give a "
                "coefficient (0.04 in the paper of GRPO)"
            )
        return filled(given) if given.get("variant") is not None else given
