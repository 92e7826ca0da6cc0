"""What the other parts of a recipe may say where the stage learns from answers of its own (ppo, grpo)."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.recipe.data import DataSpec
from luthier.recipe.generation import GenerationSpec
from luthier.recipe.method import MethodSpec
from luthier.recipe.online import OnlineSpec
from luthier.recipe.optim import AnyOptimSpec
from luthier.recipe.train import TrainSpec


def require_online(
    stage: OnlineSpec,
    data: DataSpec,
    train: TrainSpec,
    generation: GenerationSpec,
    method: MethodSpec,
    optim: AnyOptimSpec,
) -> None:
    """Raises ValueError for the first key that would say nothing, or say what cannot be, to the stage."""
    name = f"stage: {stage.type}"
    for text in (
        *_batches(train, name),
        *_data(data, name),
        *_evaluations(train, name),
        *_answers(generation),
    ):
        raise ValueError(text)
    if getattr(method, "dropout", 0.0):
        raise ValueError(
            f"method.dropout does not go with {name}: answers are drawn without dropout, so probabilities would not "
            "be those that drew them; leave it out"
        )
    if train.neftune_alpha:
        raise ValueError(
            f"train.neftune_alpha does not go with {name}: answers are drawn without noise, so probabilities would "
            "not be those that drew them; leave it out"
        )
    if optim.in_backward:
        raise ValueError(
            f"optim.type: {optim.type} changes the parameters in every backward pass, and a step of {name} has "
            "several; give another optimizer"
        )


def _batches(train: TrainSpec, name: str) -> Iterator[str]:
    given = {
        "tokens_per_batch": train.tokens_per_batch is not None,
        "rows_per_device": train.rows_per_device is not None,
        "accumulation": train.accumulation > 1,
    }
    for key, is_given in given.items():
        if is_given:
            yield (
                f"train.{key} does not go with {name}: a step is a share of a rollout; give stage.prompts_per_rollout "
                "and stage.minibatches, and train.tokens_per_pass to bound memory"
            )


def _data(data: DataSpec, name: str) -> Iterator[str]:
    learnt = {
        "packing": data.packing,
        "train_on_prompt": data.train_on_prompt,
        "mask_history": data.mask_history,
        "train_roles": data.train_roles != ("assistant",),
        "train_after_stop": data.train_after_stop,
    }
    for key, is_given in learnt.items():
        if is_given:
            yield (
                f"data.{key} does not go with {name}: rows are prompts, and only the policy's own answers are learnt; "
                "leave it out"
            )
    if data.rules == "luthier" and not data.mix.is_plain:
        yield f"data.mix does not go with {name}, whose prompts all come once in an epoch; leave it out"
    if data.overflow == "split":
        yield f"data.overflow: split does not go with {name}: half a prompt is another; give drop, truncate or error"


def _evaluations(train: TrainSpec, name: str) -> Iterator[str]:
    if train.metrics:
        yield (
            f"train.metrics does not go with {name}: its evaluations answer the prompts and report rewards; write "
            "what you want to measure as one of stage.rewards, with weight: 0 to log it alone"
        )
    if train.best_metric in ("loss", "eval_loss"):
        yield (
            f"train.best_metric: {train.best_metric} does not go with {name}, whose loss does not say how good answers "
            "are; give eval_reward, or leave it out"
        )


def _answers(generation: GenerationSpec) -> Iterator[str]:
    """What would make the answers to a prompt all the same, or others than the policy's own."""
    if generation.do_sample is False:
        yield (
            "generation.do_sample: false: the answers to a prompt would be all the same, and there would be nothing to "
            "compare; leave it out"
        )
    if generation.temperature == 0:
        yield (
            "generation.temperature: 0: the answers to a prompt would be all the same, and there would be nothing to "
            "compare; give one above 0"
        )
    if (generation.num_beams or 1) > 1:
        yield (
            f"generation.num_beams: {generation.num_beams}: a beam search does not draw from the policy, so its "
            "answers say nothing of it; leave it out"
        )
    if generation.stop:
        yield (
            "generation.stop: an answer that ends at a string was not ended by the policy, which would never learn to "
            "end one; leave it out"
        )
    if generation.seed is not None:
        yield "generation.seed: the answers of rollouts are drawn by train.seed; leave it out"
    if generation.engine != "hf":
        yield f"generation.engine: {generation.engine}: rollouts are drawn by engine: hf in this version; leave it out"
