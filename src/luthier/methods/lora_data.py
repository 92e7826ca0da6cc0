"""LoRA that starts from what the layers are given on the run's own rows: EVA and CorDA. The arithmetic is PEFT's.

EVA (Paischer et al., 2024, arXiv:2410.07170): A is the leading right singular vectors of a layer's inputs, B is 0, and
layers whose inputs spread over more directions get higher ranks. CorDA (Yang et al., 2024, arXiv:2406.05223): A and B
are factors of the weight, taken where its inputs are large (instruction-previewed) or small (knowledge-preserved).

Shapes: T tokens, I inputs of a layer, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.methods.adapter_files import ADAPTER
from luthier.methods.lora_start import start_layer
from luthier.model.calibration import Calibration, real_inputs, segment_inputs
from luthier.model.quantized_layers import is_quantized_layer
from luthier.model.reference import AdaptersOff
from luthier.types import Batch, ModelError

_MOST_ROUNDS = 100
"""How often EVA may look at all rows before its directions have to stand still."""
_INVERSE_ERROR, _MOST_DAMPING = 0.05, 1e3


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


# --------------------------------------------------------------------------------------------------
# EVA


def most_components(model: nn.Module, rho: float) -> int:
    """The most directions that a layer may be given; a pass must hold as many tokens.

    Raises ModelError for an adapter on anything but linear layers, and for more directions than a layer has inputs.
    """
    most = 0
    for name, layer in _layers(model).items():
        base = layer.get_base_layer()
        if not (isinstance(base, nn.Linear | Conv1D) or is_quantized_layer(base)):
            raise ModelError(
                f"method.init=eva looks at the inputs of linear layers, and {name} is a {type(base).__name__}; choose "
                "other targets, or init: default"
            )
        wanted = round(layer.r[ADAPTER] * rho)
        if wanted > layer.in_features:
            raise ModelError(
                f"method.init=eva: {name} has {layer.in_features} inputs, and may be given a rank of {wanted} "
                "(method.rank times method.eva_rho); lower one of them"
            )
        most = max(most, wanted)
    return most


def start_from_inputs(model: PeftModel, calibration: Calibration, rho: float, tau: float) -> None:
    """Give the fresh adapter of `model` the directions of its layers' inputs, and the ranks that these ask for.

    Raises ModelError where there are too few tokens, or the directions do not come to rest.
    """
    wanted, least = most_components(model, rho), min(batch.num_tokens for batch in calibration.batches)
    if least < wanted:
        raise ModelError(
            f"method.init=eva looks for {wanted} directions, and the rows that it is shown have {least} tokens; raise "
            "method.calibration_samples, or lower method.rank or method.eva_rho"
        )
    rounds = _Rounds(calibration)

    def inputs_of(inputs: Any, batch: Batch, name: str) -> Tensor:
        return real_inputs(inputs[0] if isinstance(inputs, tuple) else inputs, batch, model)

    _initialize(
        model,
        EvaConfig(rho=rho, tau=tau),
        dataloader=calibration.batches,
        forward_fn=rounds.forward,
        prepare_model_inputs_fn=lambda batch, config: batch,
        prepare_layer_inputs_fn=inputs_of,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def take_ranks(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Give the layers of a fresh adapter the ranks of saved `weights`; what these have no A for loses its adapter."""
    found = {name: weights.get(f"{name}.lora_A.weight") for name in _layers(model)}
    if all(a is not None and len(a) == layer.r[ADAPTER] for a, layer in _pairs(model, found)):
        return
    shapes = {
        name: torch.empty(0, layer.in_features) if a is None else a
        for (a, layer), name in zip(_pairs(model, found), found, strict=True)
    }
    _initialize(model, EvaConfig(), eva_state_dict=shapes)


def _pairs(model: nn.Module, found: Mapping[str, Tensor | None]) -> Iterator[tuple[Tensor | None, Any]]:
    layers = _layers(model)
    return ((found[name], layers[name]) for name in found)


def _initialize(model: PeftModel, how: EvaConfig, **given: Any) -> None:
    """PEFT's initialisation, on a configuration that is a plain LoRA's before and after."""
    config: Any = model.peft_config[ADAPTER]
    types = {name: layer.lora_A[ADAPTER].weight.dtype for name, layer in _layers(model).items()}
    config.init_lora_weights, config.eva_config = "eva", how
    try:
        initialize_lora_eva_weights(model, adapter_name=ADAPTER, **given)
    finally:
        config.init_lora_weights, config.eva_config = True, None
    for name, layer in _layers(model).items():
        # A layer of another rank was made anew, in the type of its base.
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            if ADAPTER in part:
                part[ADAPTER].to(types[name])


class _Rounds:
    """The forward passes that PEFT asks for, and how many they may be: it goes through the rows until its directions
    stand still, which they need not do."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration, self._done = calibration, 0

    def forward(self, model: nn.Module, batch: Batch) -> None:
        number = len(self._calibration.batches)
        if self._done > _MOST_ROUNDS * number:
            raise ModelError(
                f"method.init=eva: after {_MOST_ROUNDS} rounds over {self._calibration.num_tokens:,} tokens the "
                "directions of some layer still turn; lower method.eva_tau or method.rank, or raise "
                "method.calibration_samples"
            )
        if self._done and self._done % (10 * number) == 0:
            self._calibration.say(f"{self._calibration.label}: {self._done // number} rounds")
        self._done += 1
        self._calibration.forward(model, batch)


# --------------------------------------------------------------------------------------------------
# CorDA


def start_from_covariance(model: PeftModel, calibration: Calibration, mode: str) -> None:
    """Give the fresh adapter of `model`, and its frozen start, the factors of W C that `mode` names, C being the
    covariance of the layer's inputs: the `ipm` largest or the `kpm` smallest ones.

    It holds an I x I matrix of every layer at once. Raises ModelError for inputs that are no finite numbers.
    """
    layers = _layers(model)
    covariances = _covariances(model, calibration, layers)
    calibration.say(f"{calibration.label}: taking the factors of {len(layers)} layers")
    for name, layer in layers.items():
        base, covariance_II = layer.get_base_layer(), covariances.pop(name)
        base.eigens = _oriented_factors(name, base, covariance_II, layer.r[ADAPTER], mode)
        start_layer(layer, partial(layer.corda_init, ADAPTER, "corda"))  # it takes them off again


@torch.no_grad()
def _oriented_factors(name: str, base: Any, covariance_II: Tensor, rank: int, mode: str) -> SimpleNamespace:
    """U (O, R), S (R,) and V (I, R) of W = U S V^T, where U S X^T is the SVD of W C and V^T = X^T C^-1 (the paper's
    section 3.2), under the names by which PEFT's layers know them. Its own function for it wants the package attrs.

    C is made invertible by a part of its mean diagonal, doubled until the inverse is one, as in the authors' code.
    """
    weight_OI = base.weight.float()
    if isinstance(base, Conv1D):
        weight_OI = weight_OI.T
    unit, part = torch.eye(len(covariance_II), device=covariance_II.device), 0.01
    while True:
        damped_II = covariance_II + part * covariance_II.diagonal().mean() * unit
        inverse_II = torch.linalg.inv(damped_II)
        if torch.dist(damped_II @ inverse_II, unit) < _INVERSE_ERROR:
            break
        part *= 2
        if part > _MOST_DAMPING:
            raise ModelError(f"method.init=corda: the inputs of {name} have a covariance without an inverse")
    left_OK, sizes_K, right_KI = torch.linalg.svd(weight_OI @ damped_II, full_matrices=False)
    chosen = slice(0, rank) if mode == "ipm" else slice(len(sizes_K) - rank, len(sizes_K))
    return SimpleNamespace(
        U_WC=left_OK[:, chosen].clone(),
        S_WC=sizes_K[chosen].clone(),
        V_WC=(right_KI[chosen] @ inverse_II).T.contiguous(),
    )


@torch.no_grad()
def _covariances(model: PeftModel, calibration: Calibration, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """(I, I) of every layer the mean of X^T X over the segments; X (T, I), divided by its largest number as in the
    authors' code."""
    current: list[Batch] = []
    counts = dict.fromkeys(layers, 0)
    sums: dict[str, Any] = dict.fromkeys(layers, 0)

    def watch(name: str, layer: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        for states in segment_inputs(inputs[0], current[0], model):
            scaled = states.float() / states.float().max().abs()
            covariance = scaled.T @ scaled
            if not covariance.isfinite().all():
                raise ModelError(f"method.init=corda: the inputs of {name} are no finite numbers")
            sums[name] = sums[name] + covariance
            counts[name] += 1

    handles = [
        layer.get_base_layer().register_forward_hook(partial(watch, name)) for name, layer in layers.items()
    ]
    try:
        with AdaptersOff(model).active(model):
            for batch in calibration.passes():
                current[:] = [batch]
                calibration.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name, count in counts.items() if not count]
    if unseen:
        raise ModelError(
            f"method.init=corda: {unseen[0]} was given no token of the rows; raise method.calibration_samples, or "
            "leave it out of method.targets"
        )
    return {name: sums[name] / counts[name] for name in layers}
