"""Makes a checkpoint of a running training: a copy at once, files while the loop goes on.

The loop waits for the copy alone. Room is asked for before anything is written, a disk that fills up all the
same leaves the checkpoints before it, and what goes wrong in the background stops the run at its next step.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
from peft import PeftModel
from safetensors.numpy import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerState

from luthier.parallel.strategy import Replicated, Strategy
from luthier.trainer.checkpoint import atomic_folder
from luthier.trainer.optimizer_parts import InParts, in_parts
from luthier.trainer.processes import ALONE, Processes
from luthier.trainer.retention import require_space, rotate, what_is_left
from luthier.trainer.snapshot import (
    HostCopies,
    ModelState,
    TrainingState,
    itself,
    model_state,
    num_bytes,
    random_state,
    training_state,
)
from luthier.trainer.writer import CheckpointWriter
from luthier.types import CheckpointError, Method

LOOP_STATE_NAME = "loop_state.json"
"""What the loop itself keeps between steps: sums of the logging window, recent losses."""
EXPERIENCE_NAME = "experience.safetensors"
"""What it keeps of the rollout under way."""

ROOM_SHARE = 0.25
"""`async_save: auto` copies where the copy takes less than this share of the free memory."""


class Ongoing(Protocol):
    """What goes on from one step to the next beside the optimizer."""

    def state(self) -> dict[str, Any]:
        """JSON values."""
        ...

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """By name; nobody changes them."""
        ...


@dataclass(frozen=True, slots=True)
class _Content:
    """One checkpoint, in host memory."""

    final: Path
    metadata: Mapping[str, Any]
    model: Mapping[str, Any]
    training: TrainingState | None
    state: Mapping[str, Any]
    loop: str
    arrays: Mapping[str, np.ndarray[Any, Any]]
    parts: InParts | None
    best: Path | None


class CheckpointSaver:
    """Writes `checkpoint-N` folders of one run and deletes old ones."""

    def __init__(
        self,
        run_dir: Path,
        method: Method,
        tokenizer: PreTrainedTokenizerBase,
        *,
        asynchronous: bool,
        limit: int | None,
        only_model: bool,
        metadata: Mapping[str, Any],
        processes: Processes = ALONE,
        strategy: Strategy | None = None,
    ) -> None:
        self.run_dir, self._strategy = run_dir, strategy or Replicated()
        self._method, self._tokenizer = method, tokenizer
        self._limit, self._only_model = limit, only_model
        self._metadata = dict(metadata)
        self._copies, self._processes = HostCopies(), processes
        # What all processes write together is written before the next step.
        self.writer = CheckpointWriter(asynchronous=asynchronous and not self._strategy.writes_parts)

    def save(
        self,
        model: nn.Module,
        state: TrainerState,
        *,
        optimizer: Any,
        scheduler: Any,
        scaler: Any,
        loop: Mapping[str, Any],
        rollouts: Ongoing | None = None,
    ) -> None:
        """A checkpoint of this moment, with what is under way in `rollouts`. The first process writes it, and all of
        them call this.

        Raises CheckpointError where it, or the one before, cannot be written.
        """
        generators = self._processes.exchange(random_state())
        companions = (optimizer, scheduler, scaler, generators)
        self._processes.together(lambda: self._save(model, state, companions, loop, rollouts))

    def whole_weights(self, model: nn.Module, optimizer: Any) -> Mapping[str, Tensor]:
        """The whole weights of a model whose parts are on all processes, for the first one; all of them call this."""
        self._processes.together(self.writer.wait)  # the buffers are its until then
        return self._weights(model, optimizer).tensors

    def _weights(self, model: nn.Module, optimizer: Any) -> ModelState:
        whole = self._strategy.whole if self._strategy.shards else itself
        return model_state(model, self._copies, optimizer, whole, keep=self._processes.is_first)

    def wait(self) -> None:
        """Until the last checkpoint is written, on every process."""
        self._processes.together(self.writer.wait)

    def _save(
        self,
        model: nn.Module,
        state: TrainerState,
        companions: tuple[Any, Any, Any, Sequence[dict[str, Any]]],
        loop: Mapping[str, Any],
        rollouts: Ongoing | None,
    ) -> None:
        first, shards = self._processes.is_first, self._strategy.shards
        if not first and not shards:
            return
        self.writer.wait()  # the buffers are its until then
        optimizer, scheduler, scaler, generators = companions
        training, parts = None, None
        if not self._only_model:
            state_of_it: Any = self._strategy.optimizer_state(optimizer)
            if self._strategy.writes_parts:
                parts = in_parts(state_of_it)
                state_of_it = parts.rest
            else:
                whole = self._strategy.whole if shards else itself
                state_of_it = self._copies.tree("optimizer", state_of_it, whole, keep=first)
            training = training_state(state_of_it, scheduler, scaler, generators)
        weights = self._weights(model, optimizer)
        self._copies.finish()
        if not first:
            if parts is not None:
                parts.write(None, self._processes)
            return
        best = state.best_model_checkpoint
        content = _Content(
            final=self.run_dir / f"checkpoint-{state.global_step}",
            metadata=self._about(state),
            model=weights.tensors,
            training=training,
            state=_plain(state),
            loop=json.dumps({**loop, **({} if rollouts is None else {"rollouts": rollouts.state()})}) + "\n",
            arrays={} if rollouts is None else rollouts.arrays(),
            parts=parts,
            best=Path(best) if best is not None else None,
        )
        written: Mapping[str, Any] = weights.tensors
        if isinstance(model, PeftModel):  # the base is not written
            written = {name: written[name] for name in weights.trained}
        needed = num_bytes(written, training and training.optimizer) + (parts.num_bytes if parts else 0)
        try:
            require_space(self.run_dir, content.final.name, needed)
            self.writer.submit(lambda: self._write(model, content))
        except BaseException:
            if parts is not None and not parts.begun:
                parts.write(None, self._processes)  # the others wait for a folder
            raise

    def _about(self, state: TrainerState) -> dict[str, Any]:
        about = {"step": state.global_step, "epoch": state.epoch, **self._metadata}
        return about | {"resumable": False} if self._only_model else about

    def _write(self, model: nn.Module, content: _Content) -> None:
        try:
            with atomic_folder(content.final, metadata=content.metadata, replace=True) as folder:
                self._method.save(model, folder, content.model)
                self._tokenizer.save_pretrained(folder)
                if content.training is not None:
                    content.training.write(folder)
                text = json.dumps(content.state, indent=2, sort_keys=True) + "\n"
                (folder / "trainer_state.json").write_text(text, encoding="utf-8")
                (folder / LOOP_STATE_NAME).write_text(content.loop, encoding="utf-8")
                if content.arrays:
                    save_file(dict(content.arrays), folder / EXPERIENCE_NAME)
                if content.parts is not None:
                    content.parts.write(folder, self._processes)
            rotate(self.run_dir, self._limit, content.best, valid=content.final)
        except OSError as error:
            raise CheckpointError(
                f"{content.final.name} could not be written: {error.strerror or error}. {what_is_left(self.run_dir)}"
            ) from error


def _plain(state: TrainerState) -> dict[str, Any]:
    """The state as it is written later. A long run's log is copied as a list: its entries never change."""
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    log = list(values.pop("log_history"))
    return {**copy.deepcopy(values), "log_history": log}


def saves_asynchronously(wanted: bool | str, model: nn.Module, states_per_parameter: int = 2) -> bool:
    """Whether to copy and write in the background: as the recipe says, or where the copy is small.

    A copy holds what trains and about `states_per_parameter` numbers of the optimizer for each of it.
    """
    if isinstance(wanted, bool):
        return wanted
    trained = sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if parameter.requires_grad
    )
    return trained * (1 + states_per_parameter) < ROOM_SHARE * psutil.virtual_memory().available
