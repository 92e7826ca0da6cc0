"""A method with a critic beside it (PPO): which of it trains, how it starts, is saved and comes back.

    model, method = attach_critic(stage, model, method)

The critic becomes a part of the language model (`model.critic`), so `ModelPolicy(model).logprobs(batch, values=True)`
finds it. Attach it after the method was applied and the model was proven, before the trainer wraps it.

What is saved beside the method's own files, never among them:

    value_head.safetensors          critic: shared; in checkpoints and beside the trained model
    critic/value_head.safetensors   critic: own; in checkpoints alone
    critic/adapter_model.safetensors, adapter_config.json    of an adapter
    critic/trunk.safetensors        of a copied trunk, what of it is not the policy's
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.utils import load_peft_weights
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.methods.adapter import ATTACH_ERRORS, ends_with
from luthier.methods.adapter_files import ADAPTER, attach_scorer
from luthier.methods.fused import fuse_lora
from luthier.methods.groups import decay_groups
from luthier.methods.lora_start import has_start
from luthier.methods.token_rows import fuse_token_rows
from luthier.model.active_adapters import keeping_adapters
from luthier.model.critic import (
    CRITIC_ADAPTER,
    PART,
    AdapterCritic,
    Critic,
    TrunkCritic,
    ValueHead,
    copied_trunk,
    critic_of,
    critic_parameters,
    is_critics,
)
from luthier.model.faults import reason
from luthier.model.load import load_model, locate
from luthier.model.value_head import VALUE_HEAD_NAME, read_head, write_head
from luthier.recipe.online import PpoSpec
from luthier.recipe.schema import ModelSpec
from luthier.types import CheckpointError, Method, ModelError

FOLDER = "critic"
"""Of a critic that shares nothing, in a checkpoint."""
_TRUNK = "trunk.safetensors"

Say = Callable[[str], None]


def attach_critic(
    spec: PpoSpec, model: PreTrainedModel | PeftModel, method: Method, say: Say = lambda text: None
) -> tuple[PreTrainedModel | PeftModel, WithCritic]:
    """Give `model`, to which `method` was applied, the critic that the stage asks for; returns the same model and the
    method that trains, saves and loads both. `say` is told what the critic costs.

    Raises ModelError for a `value_start` that does not fit, and for an adapter that cannot have a second one beside it.
    """
    both = WithCritic(method, spec, say)
    both.attach(model)
    return model, both


class WithCritic:
    """`types.Method`: another method, and a critic that trains whole beside what it lets train."""

    def __init__(self, method: Method, spec: PpoSpec, say: Say = lambda text: None) -> None:
        self.method = method
        self._spec, self._say = spec, say

    def apply(self, model: Any) -> Any:
        """The model to train, with its critic; see `attach_critic`."""
        model = self.method.apply(model)
        self.attach(model)
        return model

    def parameter_groups(self, model: nn.Module, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        """The method's groups, the critic's trunk among them, and those of the value head, at `lr`."""
        head = _critic(model).head
        head.requires_grad_(False)
        try:
            groups = self.method.parameter_groups(model, weight_decay, lr)
        finally:
            head.requires_grad_(True)
        return [*groups, *decay_groups(head, weight_decay)]

    # ---- attaching ---------------------------------------------------------------------------------

    def attach(self, model: PreTrainedModel | PeftModel) -> None:
        """Make the critic a part of `model`; see `attach_critic`."""
        inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        output = inner.get_output_embeddings()
        output = getattr(
            output, "original_module", output
        )  # where PEFT trains all of it, or some of its rows
        head = ValueHead(output.in_features, next(output.parameters()).device)
        start = self._spec.value_start
        label = f"stage.value_start={start}"
        if start is not None:
            self._start_head(head, Path(start), label)
        if self._spec.critic == "shared":
            critic = Critic(head)
        elif isinstance(model, PeftModel):
            self._add_adapter(model, inner, start, label)
            critic = AdapterCritic(head)
        else:
            trunk = copied_trunk(inner, share_frozen=start is None)
            if start is not None:
                _start_trunk(trunk, Path(start), label)
            critic = TrunkCritic(head, trunk)
        setattr(inner, PART, critic.train(inner.training))
        own = critic_parameters(model)
        size = sum(one.numel() * one.element_size() for one in own)
        self._say(
            f"critic: {self._spec.critic}, {sum(one.numel() for one in own):,} parameters of its own, {_size(size)}"
        )

    def _start_head(self, head: ValueHead, folder: Path, label: str) -> None:
        weight, bias = read_head(folder, label)
        if weight.shape != head.weight.shape:
            raise ModelError(
                f"{label}: its value head reads {weight.shape[1]} numbers, and the policy's hidden states have "
                f"{head.in_features}; name a reward model of the same base"
            )
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)

    def _add_adapter(self, model: PeftModel, inner: PreTrainedModel, start: str | None, label: str) -> None:
        if start is not None and not (Path(start) / "adapter_config.json").is_file():
            raise ModelError(
                f"{label} is a whole model, and a critic of its own is an adapter here, as the policy is; name a run "
                "of stage rm with an adapter, or set stage.critic: shared"
            )
        with keeping_adapters(model):
            if start is not None:
                attach_scorer(model, start, CRITIC_ADAPTER, label)
            else:
                try:
                    model.add_adapter(CRITIC_ADAPTER, _configuration(model, inner))
                except ATTACH_ERRORS as error:
                    raise ModelError(
                        f"stage.critic=own: PEFT puts no second adapter of this kind beside the policy's "
                        f"({reason(error)}); set stage.critic: shared"
                    ) from error
            model.set_adapter(CRITIC_ADAPTER)
            _hold_still(model, inner, a=getattr(getattr(self.method, "spec", None), "freeze_a", False))
        if start is None and not has_start(model):
            _copy_adapter(model)
        fuse_token_rows(model)
        fuse_lora(model)

    # ---- files -------------------------------------------------------------------------------------

    def save(self, model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """A checkpoint: the method's files as if there were no critic, and the critic's."""
        state = model.state_dict() if state is None else state
        self.publish(model, folder, state)
        critic = _critic(model)
        if type(critic) is Critic:
            return
        beside = folder / FOLDER
        beside.mkdir(exist_ok=True)
        if isinstance(critic, AdapterCritic):
            model.save_pretrained(
                str(folder),
                save_embedding_layers=False,
                selected_adapters=[CRITIC_ADAPTER],
                state_dict={name: tensor for name, tensor in state.items() if PART not in name.split(".")},
            )
        else:
            own = {f"{PART}.trunk.{name}": name for name in _own_names(model, critic)}
            weights = {short: state[name].cpu().contiguous() for name, short in own.items()}
            save_file(weights, beside / _TRUNK, metadata={"format": "pt"})
        _write_head(state, beside)

    def publish(self, model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """What a run ends with: the trained model, and the head of a critic that shares its trunk. A critic that
        shares nothing is left out."""
        state = model.state_dict() if state is None else state
        self.method.save(model, folder, {name: state[name] for name in state if not is_critics(name)})
        if type(_critic(model)) is Critic:
            _write_head(state, folder)

    def load(self, model: Any, folder: Path) -> None:
        """Put a checkpoint that `save` wrote back. Raises CheckpointError where it, or its critic, does not fit."""
        critic = _critic(model)
        with _aside(model):
            self.method.load(model, folder)
        beside = folder if type(critic) is Critic else folder / FOLDER
        if not (beside / VALUE_HEAD_NAME).is_file():
            raise CheckpointError(
                f"{folder} holds no critic for stage.critic={self._spec.critic} ({VALUE_HEAD_NAME})"
            )
        try:
            self._start_head(critic.head, beside, str(beside))
            if isinstance(critic, AdapterCritic):
                _load_adapter(model, beside)
            elif isinstance(critic, TrunkCritic):
                _load_trunk(
                    critic.trunk, load_file(beside / _TRUNK), set(_own_names(model, critic)), str(beside)
                )
        except (ModelError, OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{beside} does not fit the critic: {reason(error)}") from error


def _critic(model: nn.Module) -> Critic:
    critic = critic_of(model)
    assert critic is not None, "attach_critic comes first"
    return critic


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.2f} MiB"


@contextmanager
def _aside(model: nn.Module) -> Iterator[None]:
    """Without the critic for a moment: a method that loads asks for every weight of the model that it sees train."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    critic = inner._modules.pop(PART)
    named = model.named_parameters()
    trained = [one for name, one in named if CRITIC_ADAPTER in name.split(".") and one.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        setattr(inner, PART, critic)
        for parameter in trained:
            parameter.requires_grad_(True)


# --------------------------------------------------------------------------------------------------
# An adapter of its own


def _configuration(model: PeftModel, inner: PreTrainedModel) -> PeftConfig:
    """The policy's adapter once more, for the trunk alone: what trains of the output head says nothing of values."""
    config: Any = copy.deepcopy(model.peft_config[ADAPTER])
    if getattr(config, "bias", "none") != "none":
        raise ModelError(
            "stage.critic=own: the adapter trains biases of the base (method.bias), which are the critic's base too; "
            "set method.bias: none, or stage.critic: shared"
        )
    output: Any = inner.get_output_embeddings()  # type: ignore[no-untyped-call]
    head = next(name for name, module in inner.named_modules() if module is output)
    if getattr(config, "modules_to_save", None):
        config.modules_to_save = [
            name for name in config.modules_to_save if not ends_with(head, name)
        ] or None
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True
    return config  # type: ignore[no-any-return]


def _hold_still(model: PeftModel, inner: PreTrainedModel, *, a: bool) -> None:
    """What of the critic's adapter is not to train: rows of the output head, and with `a` the A of LoRA-FA.

    Raises ModelError where PEFT could not save the adapter.
    """
    output: Any = inner.get_output_embeddings()  # type: ignore[no-untyped-call]
    for layer in model.modules():
        if a and isinstance(layer, LoraLayer):
            for matrices in (layer.lora_A, layer.lora_embedding_A):
                if CRITIC_ADAPTER in matrices:
                    matrices[CRITIC_ADAPTER].requires_grad_(False)
        if isinstance(layer, TrainableTokensWrapper):
            rows: Any = layer.token_adapter.trainable_tokens_delta
            if CRITIC_ADAPTER not in rows:  # PEFT asks every such layer for its rows
                raise ModelError(
                    "stage.value_start: the policy trains rows of tokens that the reward model has not; train it with "
                    "the same tokens, or set stage.critic: shared"
                )
            if layer is output and rows[CRITIC_ADAPTER] is not _input_rows(inner):
                rows[CRITIC_ADAPTER].requires_grad_(False)


def _input_rows(inner: PreTrainedModel) -> Any:
    """The critic's rows of the embeddings, which are the head's too where both are one matrix."""
    wrapper: Any = inner.get_input_embeddings()
    return (
        wrapper.token_adapter.trainable_tokens_delta[CRITIC_ADAPTER]
        if isinstance(wrapper, TrainableTokensWrapper)
        else None
    )


def _copy_adapter(model: PeftModel) -> None:
    """Let the critic's adapter begin as the policy's: a continued one is what the policy was until now."""
    named = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in named.items():
            parts = name.split(".")
            if CRITIC_ADAPTER in parts:
                source = named[".".join(ADAPTER if part == CRITIC_ADAPTER else part for part in parts)]
                assert source.shape == parameter.shape, name
                parameter.data = source.detach().clone()


def _load_adapter(model: PeftModel, folder: Path) -> None:
    weights = load_peft_weights(str(folder), device="cpu")
    result: Any = set_peft_model_state_dict(model, weights, CRITIC_ADAPTER)
    own = {name for name, _ in model.named_parameters() if CRITIC_ADAPTER in name.split(".")}
    missing = sorted(own.intersection(result.missing_keys))
    if missing or result.unexpected_keys:
        raise ModelError(f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")


# --------------------------------------------------------------------------------------------------
# A trunk of its own


def _own_names(model: nn.Module, critic: Critic) -> list[str]:
    """Parameters of a copied trunk that are not the policy's own."""
    assert isinstance(critic, TrunkCritic)
    own = critic_parameters(model)
    return [name for name, parameter in critic.trunk.named_parameters() if parameter in own]


def _start_trunk(trunk: nn.Module, folder: Path, label: str) -> None:
    """Give a copied trunk the weights of a whole reward model."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{label} is an adapter, and the critic is a whole trunk here; merge it with luthier export and name what "
            "that wrote, or set stage.critic: shared"
        )
    spec = ModelSpec(path=str(folder))
    reward = load_model(spec, locate(spec), torch.device("cpu"), own_attention=True, kind="reward")
    weights = dict(reward.base_model.state_dict())
    _load_trunk(trunk, weights, {name for name, _ in trunk.named_parameters()}, label)


def _load_trunk(trunk: nn.Module, weights: Mapping[str, Tensor], wanted: set[str], label: str) -> None:
    """Raises ModelError where these are not the weights that are wanted."""
    own = dict(trunk.named_parameters())
    missing = sorted(wanted - weights.keys())
    other = sorted(name for name in wanted & weights.keys() if own[name].shape != weights[name].shape)
    if missing or other:
        raise ModelError(
            f"{label} is another model than the policy: it has no {missing[:3]}, and {other[:3]} have another shape"
        )
    with torch.no_grad():
        for name in wanted:
            own[name].copy_(weights[name])


def _write_head(state: Mapping[str, Tensor], folder: Path) -> None:
    ends = tuple(f"{PART}.head.{part}" for part in ("weight", "bias"))
    weight, bias = (next(state[name] for name in state if f".{name}".endswith(f".{end}")) for end in ends)
    write_head(folder, weight, bias)
