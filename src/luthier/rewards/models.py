"""Rewards of a model: a run of stage rm, its adapter on the policy's own base, or any classifier of one label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from luthier.experience import Completion
from luthier.model.load import load_config, locate
from luthier.recipe.online import ModelRewardSpec
from luthier.recipe.schema import ModelSpec
from luthier.rewards.base import Judge
from luthier.rewards.classifier import Classifier, is_encoder
from luthier.rewards.scorer import Scorer
from luthier.rewards.shared import why_apart
from luthier.trained.source import run_of
from luthier.types import Conversation, DataError, Message, ModelError, Sample

Say = Callable[[str], None]


class ScoredByModel(Judge):
    """The score that a reward model with a causal backbone gives the whole conversation, rendered by its own template.

    An answer that is empty or was cut is scored as it stands.
    """

    def __init__(self, name: str, scorer: Scorer, *, shared: bool) -> None:
        super().__init__(name)
        self.scorer, self.shared = scorer, shared

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        samples = [self._sample(index, completion) for index, completion in enumerate(completions)]
        numbers = self.scorer.numbers(samples)
        return [numbers[index][0] for index in range(len(samples))]

    def _sample(self, index: int, completion: Completion) -> Sample:
        try:
            sample = self.scorer.whole(index, answered(completion))
        except DataError as error:
            raise self.fault(
                completion.prompt, f"the reward model's template cannot render the conversation: {error}"
            ) from error
        most = self.scorer.context_length
        if most is not None and len(sample.input_ids) > most:
            raise self.fault(
                completion.prompt,
                f"prompt and answer are {len(sample.input_ids)} tokens of the reward model, which has positions for "
                f"{most}",
            )
        return sample


class ScoredByClassifier(Judge):
    """The score of a sequence classifier of any other kind."""

    def __init__(self, name: str, classifier: Classifier) -> None:
        super().__init__(name)
        self.classifier = classifier

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        rows = []
        for completion in completions:
            row = self.classifier.encode(answered(completion))
            if self.classifier.most is not None and len(row["input_ids"]) > self.classifier.most:
                raise self.fault(
                    completion.prompt,
                    f"prompt and answer are {len(row['input_ids'])} tokens of the reward model, which has positions "
                    f"for {self.classifier.most}",
                )
            rows.append(row)
        return self.classifier.scores(rows)


def scored_by_model(
    spec: ModelRewardSpec, name: str, key: str, policy: nn.Module | None, policy_base: str | None, say: Say
) -> Judge:
    """The reward of a model; an adapter on the policy's base shares it where that says the same (`shared.why_apart`).

    policy_base: the path by which the policy's base was loaded. Raises ModelError for what is no reward model.
    """
    folder = Path(spec.path).expanduser()
    if (folder / "adapter_config.json").is_file():
        apart = "no policy is there to share with" if policy is None else _apart(spec, policy, folder)
        if policy is not None and apart is None:
            scorer = Scorer(folder, spec.base or policy_base, policy=policy)  # type: ignore[arg-type]
            say(f"reward {name}: {spec.path} shares the policy's base")
            return ScoredByModel(name, scorer, shared=True)
        say(f"reward {name}: {spec.path} has its base loaded apart: {apart}")
    elif spec.base is not None:
        raise ModelError(f"{key}.base: {spec.path} is a whole model, which has no model below it")
    elif run_of(folder) is None:
        plain = ModelSpec(path=spec.path)
        if is_encoder(load_config(plain, locate(plain))):
            if spec.quantization is not None:
                raise ModelError(
                    f"{key}.quantization: {spec.path} is no causal model, and is loaded as it is"
                )
            return ScoredByClassifier(name, Classifier(plain))
    return ScoredByModel(name, Scorer(spec.path, spec.base, quantization=spec.quantization), shared=False)


def _apart(spec: ModelRewardSpec, policy: nn.Module, folder: Path) -> str | None:
    if spec.base is not None or spec.quantization is not None:
        return "the recipe names another base, or how to load it"
    return why_apart(policy, folder)


def answered(completion: Completion) -> Conversation:
    """The conversation with the answer as its last message."""
    before = completion.prompt.conversation
    return Conversation((*before.messages, Message("assistant", completion.text)), before.tools)
