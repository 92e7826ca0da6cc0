"""The keeping half of the trainer: what is written while and after it trains, and read again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import safe_globals

from luthier.methods.critic import WithCritic
from luthier.parallel.strategy import Strategy
from luthier.trainer.callback_states import export_states, load_states
from luthier.trainer.evaluation import Evaluation
from luthier.trainer.ledger import Ledger
from luthier.trainer.optimizer_parts import read_parts
from luthier.trainer.processes import Processes
from luthier.trainer.retention import reading
from luthier.trainer.rollouts import Rollouts
from luthier.trainer.saving import LOOP_STATE_NAME, CheckpointSaver
from luthier.trainer.snapshot import random_file, restore_random
from luthier.trainer.stream_steps import begin_stream, stream_state
from luthier.types import Method

_SEEDS_APART = 1_000_003
"""Between the seeds of two processes' dropout."""


class Keeping(Evaluation):
    """Checkpoints and the finished model. All of them are what a single process would write, whatever the strategy."""

    method: Method
    saver: CheckpointSaver
    ledger: Ledger
    strategy: Strategy
    _steps: Any
    _rollouts: Rollouts | None
    _resumed_from: Path | None = None

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        self._resumed_from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self._num_parameters = self._num_parameters or sum(one.numel() for one in self._trained.parameters())
        # The loop underneath has a way for models that hold their parts themselves: nothing wraps them again.
        self.is_distributed_loading_by_transformers = self.strategy.shards
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[no-untyped-call]

    _num_parameters = 0

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.strategy.shards:  # parts are where they belong
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Called once the optimizer is built, before either of them is prepared."""
        wrapped, self.optimizer = self.strategy.wrap(self.accelerator, self._trained, self.optimizer)
        if wrapped is self._trained:
            return super()._wrap_model(model, training, dataloader)
        self.is_distributed_loading_by_transformers = False  # what wraps it looks after its gradients too
        return wrapped

    @property
    def _trained(self) -> nn.Module:
        assert self.model is not None
        return self.model

    # ---- writing -----------------------------------------------------------------------------------

    def save_before_step(self) -> None:
        """A checkpoint of the last step where the one after it was given up before it changed anything."""
        self.ledger.forget_step()
        if self.state.global_step:
            self._save_checkpoint(self._trained, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Everything that a resume needs, in a folder that exists whole or not at all."""
        self.to_evaluated_weights()
        self.store_flos()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(
                self.saver.run_dir / f"checkpoint-{self.state.global_step}"
            )
        export_states([*self.callback_handler.callbacks, self.control], self.state.stateful_callbacks)
        self.saver.save(
            self.accelerator.unwrap_model(self.model),
            self.state,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            scaler=getattr(self.accelerator, "scaler", None),
            loop=self.ledger.state(float(self._tr_loss)) | stream_state(self._steps, self.state.global_step),
            rollouts=self._rollouts,
        )

    def whole_weights(self) -> Mapping[str, Tensor] | None:
        """The weights as a single process would hold them, where this one holds parts; else None. All processes call
        this, and only the first one gets them."""
        self.to_evaluated_weights()
        if not self.strategy.shards:
            return None
        return self.saver.whole_weights(self.accelerator.unwrap_model(self.model), self.optimizer)

    def save_trained(self, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
        """Write what was trained, with the tokenizer; `weights` is what `whole_weights` gave."""
        save = self.method.publish if isinstance(self.method, WithCritic) else self.method.save
        save(self.accelerator.unwrap_model(self.model), folder, weights)
        assert isinstance(self.processing_class, PreTrainedTokenizerBase)
        self.processing_class.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.save_trained(folder, self.whole_weights())

    # ---- reading -----------------------------------------------------------------------------------

    def _load_callback_state(self) -> None:
        load_states(self.callback_handler.callbacks, self.state.stateful_callbacks)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        whole, folder = self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint)
        with reading(folder), self.strategy.editing(whole):
            Processes.of(self.args).together(partial(self.method.load, whole, folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(Path(checkpoint)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
            folder, together = Path(checkpoint), Processes.of(self.args).together
            # On the host: a device that has room for its part of it need not have room for the whole.
            # Where only a part is taken of it, only that is read.
            load = partial(torch.load, map_location="cpu", weights_only=True)
            state = together(partial(load, folder / "optimizer.pt", mmap=self.strategy.shards))
            self.strategy.load_optimizer(self.optimizer, read_parts(folder, state))
            assert self.lr_scheduler is not None
            self.lr_scheduler.load_state_dict(together(partial(load, folder / "scheduler.pt")))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Each process goes on with its own draws; one that the checkpoint's run had not begins to draw."""
        if checkpoint is None:
            return
        rank = Processes.of(self.args).rank
        file = random_file(Path(checkpoint), rank)
        if file is None:
            set_seed(self.args.seed + _SEEDS_APART * self._with_rows.rank + self.state.global_step)
        else:
            with safe_globals():  # type: ignore[no-untyped-call]
                restore_random(torch.load(file, map_location="cpu", weights_only=True))

    def _load_best_model(self) -> None:
        self.to_evaluated_weights()  # or saving would take what is loaded for the point where gradients are taken
        self.saver.wait()  # on every process: only then has the first one written what all read
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    # ---- beginning ---------------------------------------------------------------------------------

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A callback may have stopped training as it began: a resumed run that early stopping had ended.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def begin_ledger(self) -> None:
        """A new run begins to count; a resumed one goes on with the sums of its checkpoint."""
        checkpoint, state = self._resumed_from, dict[str, Any]()
        if checkpoint is not None:
            path = checkpoint / LOOP_STATE_NAME
            state = json.loads(Processes.of(self.args).together(partial(path.read_text, encoding="utf-8")))
        begin_stream(self._steps, state, self.state.global_step)
        if self._rollouts is not None:
            self._rollouts.begin(checkpoint, state.get("rollouts"), self.state.global_step)
        if checkpoint is None:
            self.ledger.guard.begin()
            if (rank := self._with_rows.rank) > 0:  # or all would drop the same places
                set_seed(self.args.seed + _SEEDS_APART * rank)
            return
        self._tr_loss = torch.tensor(self.ledger.restore(state), device=self.args.device)
        self._globalstep_last_logged = self.state.global_step - self.ledger.window_steps


class Begin(TrainerCallback):
    """transformers sets its sums to zero right before this event."""

    def __init__(self, trainer: Keeping) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begin_ledger()
        if state.global_step >= state.max_steps:  # resumed at its end: transformers would do one step more
            control.should_training_stop = True
