"""What happens when memory runs out in a step: an error that says what to do, or smaller passes (`train.fit_memory`).

Losses are sums over the whole step, so its cut into passes changes memory and never the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from luthier.types import Batch, ModelError

Result = TypeVar("Result")


class OutOfMemoryError(ModelError):
    """Memory ran out in one pass. It holds no tensor of that pass."""

    def __init__(self, batch: Batch) -> None:
        self.num_tokens, self.num_segments = batch.num_tokens, batch.num_segments
        super().__init__(
            f"memory ran out in a pass of {self.num_tokens} tokens; give a smaller train.tokens_per_pass, or "
            "train.fit_memory=true to have it found"
            if self.num_segments > 1
            else f"memory ran out on one sample of {self.num_tokens} tokens, and a sample is never cut; give a smaller "
            "data.max_length or model.gradient_checkpointing=true"
        )


@contextmanager
def running_out(batch: Batch) -> Iterator[None]:
    """Raises OutOfMemoryError for the allocation errors of the devices that accelerate knows."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    else:
        return
    # Outside of the handler, so that the error of the device, whose frames hold the pass's tensors, is gone.
    raise OutOfMemoryError(batch)


class Cut(Protocol):
    """What cuts steps into passes."""

    @property
    def tokens_per_pass(self) -> int | None:
        """Most tokens of a pass."""

    def limit_passes(self, tokens: int) -> None:
        """Cut this step and all later ones into passes of at most `tokens` tokens."""

    def again(self, step: int) -> list[Batch]:
        """The passes of step `step` (from 0), as they are cut now."""
        ...


class FitMemory(TrainerCallback, ExportableState):
    """Repeats a step in smaller passes where memory runs out. Checkpoints keep what was found."""

    def __init__(self, steps: Cut, say: Callable[[str], None]) -> None:
        self._steps, self._say = steps, say
        self.tokens_per_pass: int | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"tokens_per_pass": self.tokens_per_pass}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run begins with what was found, unless the recipe now asks for less."""
        if self.tokens_per_pass is not None:
            self._steps.limit_passes(
                min(self.tokens_per_pass, self._steps.tokens_per_pass or self.tokens_per_pass)
            )

    def run(
        self,
        attempt: Callable[[Sequence[Batch]], Result],
        passes: Sequence[Batch],
        step: int,
        model: nn.Module,
    ) -> Result:
        """`attempt(passes)` of step `step` (from 0), as often as it takes; gradients must be empty before it.

        A repeated attempt draws the same random numbers as the first. Raises OutOfMemoryError where a single sample
        does not fit.
        """
        generators = _Generators(next(model.parameters()).device)
        before = self._steps.tokens_per_pass
        if before is not None and any(one.num_tokens > before and one.num_segments > 1 for one in passes):
            passes = self._steps.again(step)  # the loader cut it before the limit was found
        while True:
            try:
                result = attempt(passes)
                break
            except OutOfMemoryError as error:
                if error.num_segments == 1:
                    raise
                limit = self._steps.tokens_per_pass or error.num_tokens
                while limit >= error.num_tokens:  # a half that the failed pass is within would change nothing
                    limit //= 2
            model.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            generators.restore()
            self._steps.limit_passes(limit)
            passes = self._steps.again(step)
        if self._steps.tokens_per_pass != before:
            self.tokens_per_pass = self._steps.tokens_per_pass
            self._say(
                f"memory ran out in step {step + 1}: passes now have at most {self.tokens_per_pass} tokens "
                f"(train.tokens_per_pass was {before}); the result stays the same"
            )
        return result


class _Generators:
    """torch's generators at one moment: the CPU's and the device's own."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = None if device.type == "cpu" else getattr(torch, device.type)
        self._cpu = torch.get_rng_state()
        self._device = None if self._module is None else self._module.get_rng_state()

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._module is not None:
            self._module.set_rng_state(self._device)
