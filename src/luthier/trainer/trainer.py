"""The one loop. It asks a stage for sums, divides by the weight of the global step, and knows no stage.

`PeftTrainer` is a `transformers.Seq2SeqTrainer`: devices, processes, schedules, callbacks and trackers are
its own. What differs is written here: an item of the loader is a whole optimizer step (a list of flat
passes), losses are sums divided once by their global weight, evaluation is exact sums, checkpoints are
atomic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from luthier.model.logprobs import ModelPolicy
from luthier.model.reference import Reference
from luthier.optim.build import build_optimizer, release
from luthier.optim.schedule import Factor, build_schedule
from luthier.parallel.strategy import Replicated, Strategy, may_idle
from luthier.recipe.schema import AnyOptimSpec, BadNumbersSpec
from luthier.trainer.bad_numbers import BadNumbersError, NumberGuard, Rewind
from luthier.trainer.checkpoint import newest_valid, read_manifest
from luthier.trainer.evaluation import Answers, EvalSet, observe
from luthier.trainer.keeping import Begin, Keeping
from luthier.trainer.ledger import Ledger, add_terms
from luthier.trainer.memory import FitMemory, running_out
from luthier.trainer.metrics import Metric
from luthier.trainer.precision import loss_scaling
from luthier.trainer.processes import Processes
from luthier.trainer.rollout_steps import RolloutSteps
from luthier.trainer.rollouts import Asking, Rollouts
from luthier.trainer.saving import CheckpointSaver, saves_asynchronously
from luthier.trainer.sources import source_terms
from luthier.trainer.steps import EpochCallback, StepDataset, learnt_tokens
from luthier.trainer.stream_steps import num_workers, stream_numbers
from luthier.types import Batch, LossSum, Method, ModelError, RecipeError, Stage, Term


class PeftTrainer(Keeping):
    """Trains what `method` lets change, on what `stage` asks for.

    `eval_arithmetic` is the type of evaluations, without it that of training; `reference` is what a stage is compared
    with, `schedule` what `optim.schedule_function` names; `answers` answers at evaluations; `strategy` is how several
    processes hold the model.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: Seq2SeqTrainingArguments,
        stage: Stage,
        method: Method,
        optim: AnyOptimSpec,
        steps: StepDataset | RolloutSteps | None,
        eval_sets: Mapping[str, EvalSet],
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        save_total_limit: int | None = None,
        checkpoint_metadata: Mapping[str, Any] | None = None,
        async_save: bool | str = False,
        metrics: Sequence[Metric] = (),
        eval_arithmetic: torch.dtype | None = None,
        fit_memory: FitMemory | None = None,
        bad_numbers: BadNumbersSpec | None = None,
        reference: Reference | None = None,
        schedule: Factor | None = None,
        answers: Answers | None = None,
        rollouts: Rollouts | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        self._reference, self._schedule, self._answers = reference, schedule, answers
        self._rollouts, self.stage, self.method, self._optim = rollouts, stage, method, optim
        self.strategy, processes = strategy or Replicated(), Processes.of(args)
        self._with_rows = processes.with_rows(self.strategy.copies)
        self._steps, self._eval_sets, self._metrics = steps, dict(eval_sets), tuple(metrics)
        asynchronous = saves_asynchronously(async_save, model)
        self.saver = CheckpointSaver(
            Path(str(args.output_dir)),
            method,
            tokenizer,
            asynchronous=asynchronous,
            limit=save_total_limit,
            only_model=args.save_only_model,
            metadata=checkpoint_metadata or {},
            processes=processes,
            strategy=self.strategy,
        )
        self._eval_arithmetic, self._fit_memory = eval_arithmetic, fit_memory
        self.ledger = self._new_ledger(bad_numbers or BadNumbersSpec(), processes)
        super().__init__(
            model=model,
            args=self._looking_for_unused(args, model),
            train_dataset=steps,
            eval_dataset=self._eval_sets or (None if answers is None else {}),  # type: ignore[arg-type]
            processing_class=tokenizer,
            callbacks=[*callbacks, *self._own_callbacks()],
        )
        self.remove_callback(PrinterCallback)
        if (scaling := loss_scaling(self.accelerator, model)) is not None:
            self.add_callback(scaling)
        self._scaling = scaling
        self.loss_is_scaled_for_ga = True  # by the weight of the whole step; nothing may divide them again

    def _own_callbacks(self) -> list[TrainerCallback]:
        steps = [] if self._steps is None else [EpochCallback(self._steps)]
        return [Begin(self), *steps, *([] if self._fit_memory is None else [self._fit_memory])]

    def _new_ledger(self, bad_numbers: BadNumbersSpec, processes: Processes) -> Ledger:
        guard = NumberGuard(bad_numbers, self.saver.run_dir, writes=processes.is_first)
        return Ledger(guard, self._with_rows)

    def _looking_for_unused(
        self, args: Seq2SeqTrainingArguments, model: nn.Module
    ) -> Seq2SeqTrainingArguments:
        """Where nobody decided it: whether DistributedDataParallel looks for parameters without a gradient."""
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = may_idle(model)
        looks = bool(args.ddp_find_unused_parameters)
        self._passes_are_whole = looks or self.strategy.shards or args.world_size == 1
        return args

    # ---- data --------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item per optimizer step, already this process's share; accelerate must not shard it again."""
        steps: Any = self._steps
        return DataLoader(
            steps, batch_size=1, collate_fn=itemgetter(0), num_workers=num_workers(steps, self.args)
        )

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        return 0 if self._steps is None else self._steps.num_samples

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None  # weights are counted in `training_step`, per loss term

    # ---- optimizer ---------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = model or self._trained
            groups = self.method.parameter_groups(trained, self._optim.weight_decay, self._optim.lr)
            self.optimizer = build_optimizer(self._optim, groups, trained)
            if self._scaling is not None:
                self._scaling.watch(self.optimizer)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            built = optimizer or self.create_optimizer()
            schedule = build_schedule(self._optim, built, num_training_steps, self._schedule)
            self.lr_scheduler = schedule  # type: ignore[assignment]
            self._created_lr_scheduler = True
        return self.lr_scheduler  # type: ignore[return-value]

    # ---- the step ----------------------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: list[Batch],  # type: ignore[override]
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of all passes of one step; returns this process's part of its loss."""
        if not self.ledger.begin_step(self.state.global_step + 1):
            return self._nothing_moves()
        if self._rollouts is not None:
            inputs = self._rollouts.passes(inputs, self._asking(model))  # type: ignore[arg-type]
            if not inputs:
                self.ledger.leave_out(self._rollouts.metrics)
                return self._nothing_moves()
        if self._optim.in_backward and len(inputs) > 1:
            raise RecipeError(
                f"optim.type={self._optim.type} updates parameters in the backward pass, so a step has to be one pass, "
                f"and this one has {len(inputs)}; raise train.tokens_per_pass or make the batch smaller"
            )
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()  # schedule-free optimizers train at another point than they save
        if self._fit_memory is None:
            step_loss, metrics = self._run_passes(model, inputs)
        else:
            attempt = partial(self._run_passes, model)
            step_loss, metrics = self._fit_memory.run(attempt, inputs, self.state.global_step, model)
        self._count_tokens(inputs)
        total = self.accelerator.reduce(step_loss, "mean") if self.args.world_size > 1 else step_loss
        rows = (origin for batch in inputs for origin in batch.samples)
        loss = float(total)  # which waits for the device
        metrics |= {} if self._rollouts is None else self._rollouts.updated(metrics)
        is_number = self.ledger.add_loss(loss, metrics, rows)
        return step_loss if is_number else torch.zeros_like(step_loss)

    def _nothing_moves(self) -> Tensor:
        """No gradient, and an optimizer that accelerate takes for one inside an accumulation."""
        self.accelerator.gradient_state._set_sync_gradients(False)
        return torch.zeros((), device=self.args.device)

    def _asking(self, model: nn.Module) -> Asking:
        return Asking(
            policy=ModelPolicy(model, reference=self._reference),
            model=model,
            arithmetic=self.compute_loss_context_manager,
            device=self.args.device,
            step=self.state.global_step + 1,
        )

    def _run_passes(self, model: nn.Module, passes: Sequence[Batch]) -> tuple[Tensor, dict[str, Term]]:
        """Adds the gradients of a whole step; returns this process's part of its loss, and sums of its metrics."""
        batches = [batch.to(self.args.device) for batch in passes]
        weights = self._global_weights(batches)
        policy, metrics = ModelPolicy(model, reference=self._reference), dict[str, Term]()
        with (
            running_out(max(batches, key=lambda batch: batch.num_tokens)),
            self.compute_loss_context_manager(),
        ):
            observed = observe(self.stage, policy, batches, model, self._with_rows)
        step_loss = torch.zeros((), device=self.args.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with running_out(batch), self.strategy.synchronizing(self.accelerator, model, last=last):
                with self.compute_loss_context_manager():
                    loss_sum = self.stage.loss(policy, batch, observed)
                    # The gradients of all processes are averaged; the loss is a sum over them. Rows that several have
                    # are counted as often in the weights.
                    loss = _divided(loss_sum, weights) * self.args.world_size
                self.strategy.backward(self.accelerator, model, loss, last=last)
            step_loss += loss.detach()
            add_terms(metrics, loss_sum.metrics)
            add_terms(metrics, source_terms(batch, loss_sum, getattr(self._steps, "sources", ())))
            if len(loss_sum.terms) > 1:
                add_terms(metrics, {f"{name}_loss": term for name, term in loss_sum.terms.items()})
        if not self._passes_are_whole:
            Processes.of(self.args).together(self._require_gradients)
            self._passes_are_whole = True
        return step_loss, metrics

    def _require_gradients(self) -> None:
        """Raise ModelError for a parameter that trains without a gradient, where nobody looks for such: those that are
        sent together with it would stay this process's own."""
        for name, parameter in self._trained.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                raise ModelError(
                    f"{name} trains and had no part in the first step; with several processes give "
                    "train.extra.ddp_find_unused_parameters=true, or freeze it"
                )

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self.ledger.left_out:
            return torch.zeros(())
        return self.strategy.clip(self.accelerator, model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm for the log; a bad step is dealt with here, right before the optimizer would take it."""
        if self.ledger.left_out:
            return 0.0
        norm = grad_norm if grad_norm is not None else self.strategy.clip(self.accelerator, model, math.inf)
        # With a loss scaler infinite gradients are its daily bread: it leaves the step out and scales less.
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if not self.ledger.judge(self.state.global_step + 1, None if scaled else float(norm)):
            model.zero_grad(set_to_none=True)
        return norm

    def rewind(self, request: Rewind) -> Path:
        """Prepare to train on from the last checkpoint, without what led to `request`; returns the checkpoint."""
        self.saver.wait()
        processes = Processes.of(self.args)
        checkpoint, _ = processes.first(partial(newest_valid, self.saver.run_dir, resumable=True))
        if checkpoint is None:
            raise BadNumbersError(f"{request.reason}. There is no checkpoint to go back to")
        self.ledger.guard.rewound(read_manifest(checkpoint)["metadata"]["step"], request.step)
        release(self.optimizer)
        self.optimizer = self.lr_scheduler = None
        self._trained.zero_grad(set_to_none=True)
        return checkpoint

    @property
    def tokens_per_pass(self) -> int | None:
        """Most tokens of a pass, as it is now: `train.fit_memory` may have lowered it."""
        if self._rollouts is not None:
            return self._rollouts.tokens_per_pass
        return self._steps.tokens_per_pass if isinstance(self._steps, StepDataset) else None

    def _global_weights(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The weight of each loss term over all passes of all processes of the step."""
        weights: dict[str, Tensor] = {}
        for batch in batches:
            for name, weight in self.stage.weight(batch).items():
                weights[name] = weights[name] + weight if name in weights else weight
        if self.args.world_size > 1:
            weights = {name: self.accelerator.reduce(weight, "sum") for name, weight in weights.items()}
        return weights

    def _count_tokens(self, batches: Sequence[Batch]) -> None:
        tokens = sum(map(learnt_tokens, batches))
        if self.args.world_size > 1:
            counted = int(self.accelerator.reduce(torch.tensor(tokens, device=self.args.device), "sum"))
            tokens = counted // self.strategy.copies
        self.state.num_input_tokens_seen += tokens

    def floating_point_ops(self, inputs: list[Batch]) -> int:  # type: ignore[override]
        """Six operations per token and parameter, as transformers estimates it for a whole batch."""
        batches = inputs if self._rollouts is None else self._rollouts.current
        # Those of all processes are added up.
        tokens = sum(map(learnt_tokens, batches))
        return 6 * tokens * self._num_parameters // self.strategy.copies

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # transformers' own covers the steps since the last resume alone
            logs["train_loss"] = self.ledger.mean_loss
        if "loss" in logs:
            self.ledger.close_window(logs, self._means(self.ledger.metrics) | stream_numbers(self._steps))
        if "loss" in logs and self._scaling is not None:
            self._scaling.add_to(logs)
        super().log(logs, start_time)


def _divided(loss_sum: LossSum, weights: Mapping[str, Tensor]) -> Tensor:
    """The sum of all terms, each divided by its global weight; a term without weight contributes nothing."""
    parts = [
        term.total / weights[name] if float(weights[name]) > 0 else term.total * 0.0
        for name, term in loss_sum.terms.items()
    ]
    return torch.stack(parts).sum()
