"""The training part of a recipe: how long, in which arithmetic, what is kept."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from luthier.recipe.base import Spec


class EarlyStoppingSpec(Spec):
    """Stop when the best metric has not improved for a while."""

    patience: int = Field(default=1, gt=0)
    """Evaluations without improvement."""
    threshold: float = Field(default=0.0, ge=0)
    """What counts as improvement, in units of the metric."""


class CompileSpec(Spec):
    """torch.compile of the model."""

    backend: str = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"


class HubSpec(Spec):
    """Where the finished model is uploaded."""

    repo: str
    """owner/name on the hub; made if absent."""
    private: bool = True
    revision: str | None = None
    """Branch to upload to."""


class BadNumbersSpec(Spec):
    """What happens to a step whose loss or gradient is NaN or infinite."""

    action: Literal["stop", "skip", "rewind"] = "stop"
    """End the run; leave the step out; or go back to the last checkpoint and leave out the steps since."""
    limit: int = Field(default=3, gt=0)
    """Bad steps in a row (skip), or returns in a run (rewind), before it stops all the same."""
    spike: float | None = Field(default=None, gt=0)
    """Also bad: a loss above the mean of the last ones by this many of their standard deviations."""
    window: int = Field(default=50, ge=2)
    """Losses that `spike` looks back on."""


class GenerateAtEvalSpec(Spec):
    """Answers at evaluations, drawn as the recipe's `generation` says."""

    max_samples: int | None = Field(default=None, gt=0)
    """The first rows of each evaluation set; absent: all of them."""


class TrainSpec(Spec):
    output: str = "runs/luthier"
    """The run directory. An existing run is never overwritten unless `overwrite` says so."""
    overwrite: bool = False
    """Remove the run that is in `output` first."""
    resume: str = "never"
    """`never`, `auto` (the newest valid checkpoint in `output`, if any) or the path of a checkpoint."""
    epochs: float = Field(default=3.0, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; overrides `epochs`."""
    tokens_per_batch: int | None = Field(default=None, gt=0)
    """Real tokens in one optimizer step, all processes together. 4096 if neither rule is given."""
    rows_per_device: int | None = Field(default=None, gt=0)
    """The other rule: rows (not tokens) per device and accumulation step."""
    accumulation: int = Field(default=1, gt=0)
    """With `rows_per_device`: how many such batches make one optimizer step."""
    tokens_per_pass: int | None = Field(default=None, gt=0)
    """Most tokens that go through the model at once; a memory limit that cannot change the result."""
    seed: int = 42
    data_seed: int | None = None
    """Seed of the row order; `seed` if absent."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bf16 on GPUs that have it and fp32 elsewhere."""
    eval_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of evaluations; `auto` is that of training."""
    tf32: bool | None = None
    """TensorFloat-32 for float32 matrix products on GPUs that have it; absent: torch's own setting."""
    compile: CompileSpec | None = None
    """Compile the model with torch.compile; `{}` takes its defaults."""
    deterministic: bool = False
    """Only kernels that give the same bits every time; slower, and an error where there is none."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Noise on the embeddings in training (NEFTune, arXiv:2310.05914), scaled by each sample's own length."""
    fit_memory: bool = False
    """When memory runs out, halve `tokens_per_pass` and repeat the step; the loss stays the same."""
    log_every: int = Field(default=10, gt=0)
    eval_every: int | Literal["epoch"] | None = None
    """Steps between evaluations, `epoch`, or null for only at the end."""
    eval_at_end: bool = True
    """Evaluate after training where there is something to evaluate on."""
    eval_only: bool = False
    """Do not train; evaluate and stop."""
    save_every: int | Literal["epoch"] | None = "epoch"
    """Steps between checkpoints, `epoch`, or null for none."""
    save_total_limit: int | None = Field(default=None, gt=0)
    """Checkpoints to keep; the best and the newest are never deleted."""
    save_only_model: bool = False
    """Leave optimizer and random state out of checkpoints; such a run cannot be resumed."""
    async_save: bool | Literal["auto"] = "auto"
    """Write checkpoints while training goes on, from a copy in host memory; `auto`: where there is room."""
    allow_changes: bool = False
    """Resume although recipe, base model or data changed since the checkpoint; each change is named."""
    bad_numbers: BadNumbersSpec = BadNumbersSpec()
    """What happens to a step with a NaN or infinite loss or gradient."""
    load_best: bool = False
    """Finish with the best checkpoint by `best_metric` instead of the last weights."""
    best_metric: str | None = None
    """A number that evaluations report, such as `eval_loss` or `eval_rewards/accuracies`; absent: `eval_loss`, of ppo
    and grpo `eval_reward`."""
    greater_is_better: bool | None = None
    """Absent: false for losses, `perplexity`, `nll` and what ends in `/rejected`, true for others."""
    early_stopping: EarlyStoppingSpec | None = None
    """Stop early; needs `load_best`."""
    metrics: tuple[str, ...] = ()
    """More numbers at evaluations: `accuracy`, or functions as `package.module:name` or `file.py:name`."""
    generate_at_eval: GenerateAtEvalSpec | None = None
    """Answer the prompts of the evaluation sets, too, and report BLEU, ROUGE, chrF and exact matches; `{}` takes its
    defaults. Stage sft."""
    callbacks: tuple[str, ...] = ()
    """transformers callbacks of yours, as `package.module:Class` or `file.py:Class`."""
    plots: bool = True
    """Draw the loss curves as PNG files."""
    report_to: tuple[str, ...] = ()
    """Trackers that transformers knows: tensorboard, wandb, mlflow, ..."""
    push_to_hub: HubSpec | None = None
    """Upload the finished model."""
    extra: dict[str, Any] = {}
    """Plain transformers `TrainingArguments` keys, checked against that class."""

    @field_validator("eval_every", "save_every")
    @classmethod
    def _positive(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value <= 0:
            raise ValueError("should be a positive number of steps, 'epoch' or null")
        return value

    @model_validator(mode="after")
    def _one_batch_rule(self) -> TrainSpec:
        if self.tokens_per_batch is not None and self.rows_per_device is not None:
            raise ValueError("give tokens_per_batch or rows_per_device, not both: two rules for one thing")
        if self.accumulation > 1 and self.rows_per_device is None:
            raise ValueError("accumulation goes with rows_per_device; tokens_per_batch counts the whole step")
        if self.early_stopping is not None and not self.load_best:
            raise ValueError("early_stopping needs load_best: it watches the best metric and ends with it")
        return self
