"""The critic of a policy: what it expects of an answer, before each of its tokens (PPO).

It is a part of the policy's model, `luthier_critic`, so that one forward pass gives log-probabilities and values:
`forward(targets=..., values=True)`, see `model.logprobs`. DDP and FSDP see one call, and the optimizer one model. Three
kinds: a head on the policy's own hidden states; an adapter on the same base, with its head; a copy of the trunk.

Shapes: T tokens, N supervised positions, D hidden.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.active_adapters import computing_with

PART = "luthier_critic"
"""The critic's name in the language model; a name of a parameter that has it is the critic's."""
CRITIC_ADAPTER = "critic"
"""PEFT's name for the adapter of a critic that has one."""


class ValueHead(nn.Linear):
    """A hidden state -> one number, in float32 under any autocast.

    It starts from zeros, as the value functions of the first RLHF policies did (Ziegler et al., 2019,
    arXiv:1909.08593): the first values are 0 and nothing is drawn, so the first advantages are the returns' own, and no
    random head bends the trunk that it shares with the policy. Its own gradient is not 0, so it learns from the first
    step.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, 1, device=device, dtype=torch.float32)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """(N,) float32 of (N, D) of any type."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            values: Tensor = super().forward(hidden_ND.float())[:, 0]
            return values


class Critic(nn.Module):
    """A value head on the hidden states of the policy: both shape one trunk."""

    def __init__(self, head: ValueHead) -> None:
        super().__init__()
        self.head = head

    def values(
        self, model: nn.Module, inputs: dict[str, Any], hidden_TD: Tensor, positions_N: Tensor
    ) -> Tensor:
        """(N,) float32 at these positions. `model` is the language model that it is a part of, `inputs` what its
        backbone was given, `hidden_TD` what that said."""
        values: Tensor = self.head(hidden_TD[positions_N])
        return values


class AdapterCritic(Critic):
    """An adapter of its own on the policy's frozen base: nothing that trains is shared."""

    def values(
        self, model: nn.Module, inputs: dict[str, Any], hidden_TD: Tensor, positions_N: Tensor
    ) -> Tensor:
        backbone: Any = model.base_model
        with computing_with(backbone, CRITIC_ADAPTER):
            hidden = backbone(**inputs).last_hidden_state
        return super().values(model, inputs, hidden.reshape(hidden_TD.shape), positions_N)


class TrunkCritic(Critic):
    """A trunk of its own, a copy of the policy's; what does not train is the policy's own memory where it is equal."""

    def __init__(self, head: ValueHead, trunk: nn.Module) -> None:
        super().__init__(head)
        self.trunk = trunk

    def values(
        self, model: nn.Module, inputs: dict[str, Any], hidden_TD: Tensor, positions_N: Tensor
    ) -> Tensor:
        hidden = self.trunk(**inputs).last_hidden_state
        return super().values(model, inputs, hidden.reshape(hidden_TD.shape), positions_N)


def copied_trunk(model: nn.Module, *, share_frozen: bool) -> nn.Module:
    """A copy of a language model's backbone; with `share_frozen` what does not train is not copied."""
    backbone = model.base_model
    assert isinstance(backbone, nn.Module)
    frozen = [parameter for parameter in backbone.parameters() if not parameter.requires_grad]
    return copy.deepcopy(backbone, {id(one): one for one in frozen} if share_frozen else {})


def critic_of(model: nn.Module) -> Critic | None:
    """The critic of a language model, or of the one inside its wrappers."""
    return next((module for module in model.modules() if isinstance(module, Critic)), None)


def is_critics(name: str) -> bool:
    """Whether a parameter, by its name in a model that has a critic, is the critic's."""
    parts = name.split(".")
    return PART in parts or CRITIC_ADAPTER in parts


def critic_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What of a model is the critic's alone; nothing where it has none."""
    if critic_of(model) is None:
        return set()
    named = list(model.named_parameters(remove_duplicate=False))
    of_policy = {parameter for name, parameter in named if not is_critics(name)}
    return {parameter for name, parameter in named if is_critics(name)} - of_policy
