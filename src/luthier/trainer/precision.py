"""16-bit arithmetic in the loop: float16's loss scaling, and the types that autocast works in.

float16 has no numbers below 6e-8, so small gradients would vanish. The loss is multiplied by a scale before backward
and the gradients divided by it before clipping; a step whose gradients overflow is left out and the scale is
halved (Micikevicius et al., 2018, arXiv:1710.03740). bfloat16 has the range of float32 and needs none of this.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from luthier.types import ModelError

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of `train.precision` and `train.eval_precision`; float32 is autocast off."""


def autocast_type(precision: str) -> torch.dtype | None:
    """The type of the autocast that training uses; None where there is none."""
    return None if precision == "fp32" else AUTOCAST[precision]


LEAST_SCALE = 1e-4
"""Below it no gradient can be what overflows; the activations themselves are beyond 65504."""


class LossScaling(TrainerCallback, ExportableState):
    """Counts the steps that the loss scaler left out, and says so in the log; checkpoints keep the count."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.left_out = 0
        self.last_left_out = False

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"left_out": self.left_out, "last_left_out": self.last_left_out}}

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the scaler decide before the step. A fused optimizer would skip in its kernel, and nobody would know:
        the schedule would go on and the step count as taken."""
        if hasattr(optimizer, "_step_supports_amp_scaling"):
            optimizer._step_supports_amp_scaling = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises ModelError where the scale has collapsed: then no step can be taken any more."""
        self.last_left_out = self._accelerator.optimizer_step_was_skipped
        self.left_out += self.last_left_out
        assert self._accelerator.scaler is not None
        scale = self._accelerator.scaler.get_scale()
        if scale < LEAST_SCALE:
            raise ModelError(
                f"train.precision=fp16: the gradients overflow at every loss scale down to {scale:.2g} (step "
                f"{state.global_step + 1}), so the model's own numbers leave float16's range; use bf16 or fp32"
            )

    def add_to(self, logs: dict[str, float]) -> None:
        """Put the scale and the steps left out since the last line into `logs`, in place.

        The gradient norm of a step that was left out is only that overflow, and goes.
        """
        assert self._accelerator.scaler is not None
        logs |= {"loss_scale": self._accelerator.scaler.get_scale(), "skipped_steps": self.left_out}
        if self.last_left_out:
            logs.pop("grad_norm", None)
        self.left_out = 0


def loss_scaling(accelerator: Accelerator, model: nn.Module) -> LossScaling | None:
    """The loss scaling of an fp16 run; None for other precisions and under engines that scale by themselves.

    accelerate leaves both autocast and scaler out on a CPU and trains in float32 there without a word; torch has
    both. Call it before `accelerator.prepare`. Raises ModelError where weights that train are float16: their
    updates would vanish, and torch refuses to unscale their gradients.
    """
    if accelerator.mixed_precision != "fp16" or accelerator.distributed_type == DistributedType.DEEPSPEED:
        return None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ModelError(
                f"train.precision=fp16 with {name} in float16: weights that train must be float32 for loss scaling; "
                "give model.dtype=float32"
            )
    if accelerator.scaler is None:
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
    return LossScaling(accelerator)
