"""grpo and its variants = TRL's GRPOTrainer and RLOOTrainer, on the same model, answers and rewards.

TRL scores the answers and computes the loss; only its sampling is replaced by answers that are given. From rewards to
the gradients of the model nothing is shared.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from luthier.experience import Rollout
from luthier.model.logprobs import ModelPolicy
from luthier.recipe.online import GrpoSpec
from luthier.stages import build_stage
from luthier.stages.advantages import alone
from luthier.types import Sample
from tests.preference import OPTIONS, Models, divided, gradients_of, made_models
from tests.reference import assert_same_gradients
from tests.rollouts import EXACT, learnt_samples, random_rollout
from tests.tiny import chat_tokenizer

GROUP, PROMPTS, BOUND = 4, 3, 9
CUT = (1, 6)
"""Numbers of the answers that do not end with the stop token."""


@pytest.fixture(scope="module")
def models() -> Models:
    return made_models()


@pytest.fixture(scope="module")
def rollout(models: Models) -> Rollout:
    """Answers that end with the stop token or were cut; the policy before the update is near the one of now."""
    made, stop = random_rollout(PROMPTS, GROUP, seed=21, longest=BOUND - 2), chat_tokenizer().eos_token_id
    completions = []
    for number, completion in enumerate(made.completions):
        ids = completion.ids.copy()
        if number not in CUT:
            ids[-1] = stop
        completions.append(replace(completion, ids=ids, finish="length" if number in CUT else "stop"))
    made = replace(made, completions=tuple(completions))
    with torch.no_grad():
        now, reference = (logprobs_of(model, made) for model in (models.policy, models.reference))
    noise = torch.randn(2, len(now), generator=torch.Generator().manual_seed(2))
    before = now + 0.25 * noise[0]
    return replace(
        made,
        logprobs=before.numpy(),
        sampled=(before + 0.3 * noise[1]).numpy(),
        reference=reference.numpy(),
    )


def logprobs_of(model: Any, rollout: Rollout) -> Tensor:
    """(N,) in the order of the rollout."""
    stage: Any = build_stage(GrpoSpec(rewards=[EXACT], group_size=GROUP), OPTIONS)
    batch = stage.collate(learnt_samples(stage, rollout, {}))
    found = ModelPolicy(model).logprobs(batch).logprobs.detach()
    return torch.zeros_like(found).index_copy(0, batch.signals["place"].long(), found)


# ---- TRL ---------------------------------------------------------------------------------------------------


def trainer_of(kind: str, models: Models, folder: Path, rollout: Rollout, **options: Any) -> Any:
    """TRL's trainer of the plain copy of the policy, which is handed the rollout's answers."""
    made, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    rows = [{"prompt": "a", "number": number} for number in range(len(rollout.completions))]
    beta = options.pop("beta", 0.0)
    args = config(
        str(folder),
        beta=0.0,  # with another one TRL would load a reference from the hub; its log-probabilities are given
        num_generations=GROUP,
        per_device_train_batch_size=len(rows),
        gradient_accumulation_steps=1,
        max_completion_length=BOUND,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )

    def reward(number: list[int], **others: Any) -> list[float]:
        return [float(rollout.totals[k]) for k in number]

    trainer: Any = made(
        models.plain_policy,
        reward,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=chat_tokenizer(),
    )
    trainer.beta = beta
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    prompts = [list(one.prompt.ids) for one in rollout.completions]
    answers = [one.ids.tolist() for one in rollout.completions]
    parts = torch.from_numpy(rollout.sampled).split(rollout.lengths.tolist())
    sampled = [part.tolist() for part in parts]
    texts = [""] * len(rows)
    if kind == "grpo":
        trainer._generate = lambda _: (prompts, answers, None, texts, sampled, {}, None, None)
    else:
        trainer._generate = lambda _: (prompts, answers, texts)
    return trainer


def grid(values: Tensor, rollout: Rollout) -> Tensor:
    """(B, longest) numbers of tokens, padded on the right."""
    rows = values.split(rollout.lengths.tolist())
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def trl_loss(
    trainer: Any, models: Models, rollout: Rollout, *, fresh: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """TRL's loss of the rollout and its gradients; `fresh` where the policy is the one that sampled."""
    rows = [{"prompt": "a", "number": number} for number in range(len(rollout.completions))]
    before = grid(torch.from_numpy(rollout.logprobs), rollout)
    dense = trainer._get_per_token_logps_and_entropies

    def policy_before(*args: Any, **kwargs: Any) -> Any:
        return before, None, None

    # What TRL would compute of the model that sampled, which is not there any more: only that is given.
    trainer._get_per_token_logps_and_entropies = policy_before
    beta, trainer.beta = trainer.beta, 0.0
    inputs = trainer._generate_and_score_completions(rows)
    trainer.beta = beta
    trainer._get_per_token_logps_and_entropies = dense
    if isinstance(trainer, GRPOTrainer):
        if not fresh:
            inputs["old_per_token_logps"] = before
        if beta:
            assert rollout.reference is not None
            inputs["ref_per_token_logps"] = grid(torch.from_numpy(rollout.reference), rollout)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), gradients_of(models.plain_policy)


# ---- ours --------------------------------------------------------------------------------------------------


def own_loss(
    models: Models, rollout: Rollout, spec: GrpoSpec, temperature: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """In two passes, whose sums are divided by the weight of both."""
    stage: Any = build_stage(spec, OPTIONS, temperature=temperature, max_new_tokens=BOUND)
    samples: list[Sample] = learnt_samples(stage, rollout, stage.signals(rollout, alone))
    batches = [stage.collate(samples[:1]), stage.collate(samples[1:])]
    policy, total = ModelPolicy(models.policy), torch.zeros(())
    weights = {name: sum(stage.weight(batch)[name] for batch in batches) for name in stage.terms}
    for batch in batches:
        loss = divided(stage.loss(policy, batch, {}), weights)
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    return total, gradients_of(models.policy)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo", "beta": 0.04}, {"variant": "grpo"}),
    "grpo without reference": (
        {"loss_type": "grpo", "epsilon": 0.1},
        {"variant": "grpo", "clip": 0.1, "kl": {"coefficient": 0.0}},
    ),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "bnpo, batch deviation": ({"loss_type": "bnpo", "scale_rewards": "batch"}, {"advantage": "batch"}),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, {"variant": "dr_grpo"}),
    "dr_grpo with reference": (
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.1},
        {"variant": "dr_grpo", "kl": {"coefficient": 0.1}},
    ),
    "dapo": (
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "mask_truncated_completions": True},
        {"variant": "dapo"},
    ),
    "dapo with truncated answers and reference": (
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.2},
        {"variant": "dapo", "mask_truncated": False, "kl": {"coefficient": 0.2}},
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"variant": "gspo"},
    ),
    "gspo, wide, with reference": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.3, "beta": 0.1},
        {"variant": "gspo", "clip": 0.3, "clip_high": 0.3, "kl": {"coefficient": 0.1}},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, {"variant": "cispo"}),
    "cispo, low cap": ({"loss_type": "cispo", "epsilon_high": 1.1}, {"variant": "cispo", "clip_high": 0.1}),
    "corrected divergence": (
        {"loss_type": "dapo", "beta": 0.2, "use_bias_correction_kl": True},
        {"kl": {"coefficient": 0.2}, "kl_correction": True},
    ),
    "corrected divergence, ratio of answers": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "beta": 0.2,
            "use_bias_correction_kl": True,
        },
        {"aggregation": "sequence", "ratio": "sequence", "kl": {"coefficient": 0.2}, "kl_correction": True},
    ),
    "entropy": ({"loss_type": "grpo", "entropy_coef": 0.05}, {"aggregation": "sequence", "entropy": 0.05}),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_grpo(case: str, models: Models, rollout: Rollout, tmp_path: Path) -> None:
    options, fields = CASES[case]
    trainer = trainer_of("grpo", models, tmp_path, rollout, **{"use_bias_correction_kl": False, **options})
    expected, wanted = trl_loss(trainer, models, rollout)
    spec = GrpoSpec.model_validate({"rewards": [EXACT], "group_size": GROUP, "epochs": 2, **fields})
    found, gradients = own_loss(models, rollout, spec)
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert_same_gradients(gradients, wanted)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_first_update(loss_type: str, models: Models, rollout: Rollout, tmp_path: Path) -> None:
    """TRL leaves the log-probabilities before the update away, as we do."""
    trainer = trainer_of("grpo", models, tmp_path, rollout, loss_type=loss_type)
    expected, wanted = trl_loss(trainer, models, rollout, fresh=True)
    aggregation = {"grpo": "sequence", "dapo": "token"}[loss_type]
    spec = GrpoSpec(rewards=[EXACT], group_size=GROUP, aggregation=aggregation)
    found, gradients = own_loss(models, rollout, spec)
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert_same_gradients(gradients, wanted)


def test_temperature(rollout: Rollout, tmp_path: Path) -> None:
    """Log-probabilities and entropies are those of the distribution that was sampled from."""
    models = made_models()
    trainer = trainer_of(
        "grpo", models, tmp_path, rollout, loss_type="dapo", temperature=0.6, entropy_coef=0.1
    )
    expected, wanted = trl_loss(trainer, models, rollout, fresh=True)
    spec = GrpoSpec(rewards=[EXACT], group_size=GROUP, entropy=0.1)
    found, gradients = own_loss(models, rollout, spec, temperature=0.6)
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert_same_gradients(gradients, wanted)


def test_truncated_importance(models: Models, rollout: Rollout, tmp_path: Path) -> None:
    """TRL corrects so for vLLM, token by token; it is told that vLLM sampled."""
    trainer = trainer_of(
        "grpo",
        models,
        tmp_path,
        rollout,
        loss_type="dapo",
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=1.2,
    )
    trainer.use_vllm = True
    expected, wanted = trl_loss(trainer, models, rollout)
    spec = GrpoSpec(rewards=[EXACT], group_size=GROUP, epochs=2, importance_cap=1.2)
    found, gradients = own_loss(models, rollout, spec)
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert_same_gradients(gradients, wanted)


def test_rloo(models: Models, rollout: Rollout, tmp_path: Path) -> None:
    """The answer as one action, clipped by its whole ratio."""
    trainer = trainer_of("rloo", models, tmp_path, rollout, epsilon=0.4)
    expected, wanted = trl_loss(trainer, models, rollout)
    spec = GrpoSpec.model_validate(
        {"rewards": [EXACT], "group_size": GROUP, "epochs": 2, "variant": "rloo", "clip": 0.4}
    )
    found, gradients = own_loss(models, rollout, spec)
    assert float(found) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert_same_gradients(gradients, wanted)


def test_what_would_be_seen(models: Models, rollout: Rollout, tmp_path: Path) -> None:
    """The comparison is not blind: other advantages, aggregation, range or ratio give other gradients."""
    trainer = trainer_of("grpo", models, tmp_path, rollout, loss_type="grpo")
    _, wanted = trl_loss(trainer, models, rollout)
    same = {"rewards": [EXACT], "group_size": GROUP, "epochs": 2, "aggregation": "sequence"}
    assert_same_gradients(own_loss(models, rollout, GrpoSpec.model_validate(same))[1], wanted)
    for fault in (
        {"aggregation": "token"},
        {"aggregation": "constant"},
        {"advantage": "rloo"},
        {"advantage": "reinforce_pp"},
        {"clip_high": 0.25},
        {"clip": 0.25, "clip_high": 0.2},
        {"ratio": "sequence"},
        {"loss": "cispo"},
        {"kl": {"coefficient": 0.01}},
        {"mask_truncated": True},
    ):
        spec = GrpoSpec.model_validate({**same, **fault})
        gradients = own_loss(models, rollout, spec)[1]
        with pytest.raises(AssertionError):
            assert_same_gradients(gradients, wanted)
