"""A step of ppo through policy and critic = the same in plain transformers and autograd, from rewards to gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.experience import Rollout
from luthier.methods import build_method
from luthier.methods.critic import attach_critic
from luthier.model.critic import critic_of
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.recipe.online import PpoSpec
from luthier.recipe.schema import FullSpec
from luthier.stages import build_stage
from luthier.stages.advantages import alone
from tests.preference import OPTIONS, divided
from tests.rollouts import EXACT, learnt_samples, random_rollout
from tests.tiny import tiny_model

TEMPERATURE = 0.8
SPEC = PpoSpec.model_validate(
    {
        "rewards": [EXACT],
        "kl": {"coefficient": 0.1, "estimator": "k1"},
        "discount": 0.97,
        "trace": 0.9,
        "clip": 0.15,
        "value_clip": 0.3,
        "value_weight": 0.5,
        "entropy": 0.02,
    }
)


def said(model: Any, head: Any, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) log-probabilities, entropies and values: each answer alone, whole logits, the last hidden states."""
    columns: list[tuple[Tensor, ...]] = []
    for one in rollout.completions:
        ids = torch.tensor([[*one.prompt.ids, *one.ids.tolist()]])
        told = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        at = torch.arange(len(one.prompt.ids) - 1, ids.shape[1] - 1)
        table = (told.logits[0, at] / TEMPERATURE).log_softmax(-1)
        chosen = table[torch.arange(len(at)), ids[0, at + 1]]
        values = told.hidden_states[-1][0, at] @ head.weight[0] + head.bias
        columns.append((chosen, -(table.exp() * table).sum(-1), values))
    logprobs, entropy, values = (torch.cat(column) for column in zip(*columns, strict=True))
    return logprobs, entropy, values


def dense_loss(rollout: Rollout, now: tuple[Tensor, Tensor, Tensor], before: dict[str, Tensor]) -> Tensor:
    """The published loss, advantages by the definition of GAE as a sum over all later tokens."""
    bounds = [0, *rollout.lengths.cumsum().tolist()]
    advantages = torch.zeros(bounds[-1])
    for number, (start, stop) in enumerate(pairwise(bounds)):
        rewards = -0.1 * (before["logprobs"][start:stop] - before["reference"][start:stop])
        rewards[-1] += float(rollout.totals[number])
        values = before["values"][start:stop]
        errors = rewards + 0.97 * torch.cat((values[1:], torch.zeros(1))) - values
        for t in range(stop - start):
            advantages[start + t] = sum((0.97 * 0.9) ** k * errors[t + k] for k in range(stop - start - t))
    returns = advantages + before["values"]
    white = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
    logprobs, entropy, values = now
    ratio = (logprobs - before["logprobs"]).exp()
    surrogate = torch.min(ratio * white, ratio.clamp(0.85, 1.15) * white)
    near = before["values"] + (values - before["values"]).clamp(-0.3, 0.3)
    errors = torch.max((values - returns) ** 2, (near - returns) ** 2) / 2
    return (-surrogate + 0.5 * errors - 0.02 * entropy).mean()


@pytest.mark.parametrize("cut", [1, 3])
def test_a_step_of_policy_and_critic(cut: int) -> None:
    """Also in three passes, whose sums are divided by the weight of all."""
    built = build_method(FullSpec())
    model = built.apply(tiny_model("llama"))
    install_target_forward(model)
    model, _ = attach_critic(SPEC, model, built, lambda text: None)
    critic: Any = critic_of(model)
    twin, head = tiny_model("llama", "eager"), torch.nn.Linear(32, 1)
    with torch.no_grad():
        critic.head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
        head.weight.copy_(critic.head.weight)
        head.bias.zero_()
    made = random_rollout(6, 1, seed=13, longest=9)
    now = said(twin, head, made)
    noise = 0.2 * torch.randn(3, len(now[0]), generator=torch.Generator().manual_seed(4))
    before = {
        "logprobs": now[0].detach() + noise[0],
        "reference": now[0].detach() + 3 * noise[1],
        "values": now[2].detach() + 2 * noise[2],
    }
    rollout = Rollout(
        made.completions, 1, made.rewards, made.totals, sampled=made.sampled,
        **{name: values.numpy() for name, values in before.items()},
    )  # fmt: skip
    expected = dense_loss(rollout, now, before)
    expected.backward()  # type: ignore[no-untyped-call]

    stage: Any = build_stage(SPEC, OPTIONS, temperature=TEMPERATURE)
    samples = learnt_samples(stage, rollout, stage.signals(rollout, alone))
    batches = [stage.collate(samples[k::cut]) for k in range(cut)]
    weights = {name: sum(stage.weight(batch)[name] for batch in batches) for name in stage.terms}
    total = torch.zeros(())
    for batch in batches:
        loss = divided(stage.loss(ModelPolicy(model), batch, {}), weights)
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    assert float(total) == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted = {name: one.grad for name, one in twin.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in wanted.values() if gradient is not None)
    found = dict(model.named_parameters())
    for name, gradient in wanted.items():
        assert float((found[name].grad - gradient).abs().max()) <= 1e-5 * scale, name
    assert torch.allclose(critic.head.weight.grad, head.weight.grad, rtol=1e-4, atol=1e-6)
    assert torch.allclose(critic.head.bias.grad, head.bias.grad, rtol=1e-4, atol=1e-6)
