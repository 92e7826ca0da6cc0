"""A reward adapter on the policy's own base: one more adapter beside the one that trains, and its value head apart.

The base is in memory once. The adapter is switched in for the length of a scoring pass and out again; what trains, what
is active and which mode every module is in are afterwards what they were before, and saving the policy's adapter
(`Method.save` names it) leaves this one out.

Shapes: T tokens of a flat row, R rows that are scored, D hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import Tensor, nn

from luthier.methods.adapter_files import ADAPTER
from luthier.model.active_adapters import keeping_adapters
from luthier.model.base_record import BaseRecord, differences, read_base, remembered_base
from luthier.model.faults import LOAD_ERRORS, reason
from luthier.model.logprobs import model_inputs
from luthier.model.positions import loaded_positions, read_positions
from luthier.model.value_head import HEAD_WEIGHT
from luthier.model.vocabulary import read_record
from luthier.types import IGNORE_INDEX, Batch, ModelError

_NAME = "reward"
_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector.weight"
_HEAD = f"{_PREFIX}{HEAD_WEIGHT}"


class SharedRewardModel:
    """The scores of a reward adapter, computed by the base of a policy that trains another adapter.

    Attaches the adapter in `folder` to `policy`, whose target forward is installed. arithmetic: the type to compute in
    by autocast, as `ModelPolicy` takes it. Raises ModelError where the adapter does not fit this base; ask `why_apart`
    before.
    """

    def __init__(self, policy: PeftModel, folder: str | Path, arithmetic: torch.dtype | None = None) -> None:
        self._policy, self._arithmetic = policy, arithmetic
        taken = set(policy.peft_config)
        self.name = next(name for name in _names() if name not in taken)
        """Of the adapter in the policy."""
        known = set(policy.modules())
        with _left_as_it_was(policy):
            head = _attach(policy, str(folder), self.name)
        for name, parameter in policy.named_parameters():
            if self.name in name.split("."):
                parameter.requires_grad_(False)
        for module in (
            set(policy.modules()) - known
        ):  # a layer that is adapted only now, and parts of the adapter
            base: Any = getattr(module, "base_layer", None)
            module.training = base is not None and base.training
        self._head_1D = head.to(next(policy.parameters()).device, torch.float32)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """(R,) float32: the score at the last token of each row, as a model with this value head says it."""
        assert batch.rows is not None
        last_R = batch.cu_seqlens[1:].long()[batch.rows] - 1
        targets_T = torch.full((batch.num_tokens,), IGNORE_INDEX, device=last_R.device)
        targets_T[last_R] = 0  # no target is looked at: it marks where hidden states are wanted
        with self._active():
            hidden_RD: Tensor = self._policy(
                **model_inputs(batch), targets=targets_T, arithmetic=self._arithmetic, only_hidden=True
            )["hidden"]
        with torch.autocast(hidden_RD.device.type, enabled=False):
            in_order_R = nn.functional.linear(hidden_RD.float(), self._head_1D)[:, 0]
        return in_order_R[last_R.argsort().argsort()]

    @contextmanager
    def _active(self) -> Iterator[None]:
        """With this adapter alone, and without dropout."""
        with _left_as_it_was(self._policy):
            self._policy.set_adapter(self.name, inference_mode=True)
            self._policy.eval()
            yield


def why_apart(policy: nn.Module, folder: str | Path) -> str | None:
    """Why the reward adapter in `folder` cannot be given the policy's base; None where it can, and says the same there.

    The policy's base has to be the one that the adapter was trained on: the same files, as their fingerprints say,
    rounded and stretched in the same way, with the same adapters merged into it.
    """
    if not isinstance(policy, PeftModel):
        return "the policy trains its base"
    ours, theirs = remembered_base(policy), read_base(folder)
    if ours is None or theirs is None or theirs.fingerprint is None:
        return "the adapter does not say which base it was trained on"
    different = _different_base(ours, theirs)
    if different is not None:
        return different
    if read_record(folder) is not None:
        return "it was trained with new tokens"
    if read_positions(folder) != loaded_positions(policy):
        return "the positions of one of them are stretched"
    return _unlike_lora(policy, PeftConfig.from_pretrained(str(folder))) or _no_place(policy, folder)


def _different_base(ours: BaseRecord, theirs: BaseRecord) -> str | None:
    if ours.fingerprint != theirs.fingerprint:
        return "it was trained on another base"
    different = differences([("the policy", ours.quantization), ("the reward model", theirs.quantization)])
    if different is not None:
        return different
    if ours.dtype != theirs.dtype:
        return f"the policy's base is in {ours.dtype}, its own was in {theirs.dtype}"
    if ours.adapters != theirs.adapters:
        return "other adapters are merged into the policy's base than into its own"
    return None


def _unlike_lora(policy: PeftModel, config: PeftConfig) -> str | None:
    """PEFT puts one adapter beside another only where both are of one kind and touch nothing else of the base."""
    for who, one in (("the policy", policy.peft_config[ADAPTER]), ("the reward model", config)):
        settings = vars(one)
        if not isinstance(one, LoraConfig):
            return f"the adapter of {who} is none of LoRA"
        if settings.get("bias") != "none" or settings.get("init_lora_weights") == "orthogonal":
            return f"the adapter of {who} changes the base itself"
        if settings.get("target_parameters"):
            return f"the adapter of {who} is on parameters, not on layers"
    settings = vars(config)
    whole = set(settings.get("modules_to_save") or ()) - {"score", "classifier"}
    if whole or settings.get("trainable_token_indices"):
        return "modules of it train as a whole"
    return None


def _no_place(policy: PeftModel, folder: str | Path) -> str | None:
    """Reward models of some families have their layers under other names than the language model."""
    known = {name for name, _ in policy.get_base_model().named_modules()}
    for key in load_peft_weights(str(folder), device="cpu"):
        layer = key.removeprefix(_PREFIX).split(".lora_")[0]
        if key != _HEAD and layer not in known:
            return f"its layer {layer} has another name in the policy"
    return None


def _attach(policy: PeftModel, folder: str, name: str) -> Tensor:
    """Put the adapter into the policy under `name`; returns its value head (1, D)."""
    try:
        config: Any = PeftConfig.from_pretrained(folder)
        config.task_type, config.modules_to_save, config.inference_mode = None, None, True
        weights = dict(load_peft_weights(folder, device="cpu"))
        head = weights.pop(_HEAD, None)
        if head is None or head.shape[0] != 1:
            raise ModelError(f"{folder} has no value head of one score ({_HEAD})")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the keys that are counted below
            policy.add_adapter(name, config)
    except LOAD_ERRORS as error:
        raise ModelError(f"{folder} could not be attached to the policy's base: {reason(error)}") from error
    _fill(policy, name, weights, folder)
    return torch.as_tensor(head)


def _fill(policy: PeftModel, name: str, weights: Mapping[str, Tensor], folder: str) -> None:
    """Give the adapter its saved weights. PEFT's own loading asks for token rows of every adapter where one has any."""
    own = {_saved_as(key, name): p for key, p in policy.named_parameters() if name in key.split(".")}
    odd = sorted({*own} ^ {*weights}) or [key for key in own if own[key].shape != weights[key].shape]
    if odd:
        raise ModelError(
            f"{folder} does not fit the policy's base: {len(odd)} of its weights ({odd[0]} for one)"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(weights[key])


def _saved_as(key: str, name: str) -> str:
    """The key of a parameter in a saved adapter, which has no name."""
    plain = ".".join(part for part in key.split(".") if part != name)
    return plain.removesuffix(".weight") if plain.endswith(_MAGNITUDE) else plain


def _names() -> Iterator[str]:
    number = 1
    while True:
        yield _NAME if number == 1 else f"{_NAME}_{number}"
        number += 1


@contextmanager
def _left_as_it_was(model: PeftModel) -> Iterator[None]:
    """As `keeping_adapters`, and every module is in its mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        with keeping_adapters(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
