"""The method part of a recipe: what may change."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from luthier.recipe.base import Spec


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    return text


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_expression)]
"""A regular expression that is searched in the full names of parameters (`model.layers.0.mlp.up_proj.weight`)."""


class FullSpec(Spec):
    """Every parameter trains, but those that `frozen` names."""

    type: Literal["full"] = "full"
    frozen: tuple[Pattern, ...] = ()
    """Regular expressions: parameters in whose full name one of them is found stay as they are."""


class FreezeSpec(Spec):
    """Some layers train, everything else is frozen."""

    type: Literal["freeze"] = "freeze"
    layers: int = 2
    """n > 0: the last n decoder layers train; n < 0: the first |n|; 0: none (use `extra_modules`)."""
    modules: tuple[str, ...] = ("all",)
    """Names of modules inside those layers (`self_attn`, `mlp`, ...), or `all`."""
    extra_modules: tuple[str, ...] = ()
    """Modules outside the layers that train too (`embed_tokens`, `lm_head`, `norm`)."""
    trains: tuple[Pattern, ...] = ()
    """Regular expressions: parameters in whose full name one of them is found train too; with layers: 0 they alone."""
    frozen: tuple[Pattern, ...] = ()
    """Regular expressions: what of all this stays as it is."""


class LlamaProSpec(Spec):
    """Block expansion (Wu et al., 2024, arXiv:2401.02415): copies of blocks that start as the identity, and train.

    The finished run is a whole model with more layers.
    """

    type: Literal["llama_pro"] = "llama_pro"
    blocks: int = Field(default=2, gt=0)
    """How many blocks are added: one behind every (layers / blocks) of the model's own."""
    expand: bool = True
    """False: the model was expanded before; the blocks at those places train and nothing is added."""
    modules: tuple[str, ...] = ("all",)
    """Names of modules inside the new blocks (`self_attn`, `mlp`, ...), or `all`."""
    extra_modules: tuple[str, ...] = ()
    """Modules outside the blocks that train too (`embed_tokens`, `lm_head`, `norm`)."""


class AdapterSpec(Spec):
    """What every adapter shares."""

    adapters: tuple[str, ...] = ()
    """Adapter folders to start from: all but the last are merged into the base, the last one is continued."""
    create_new_adapter: bool = False
    """Merge all of `adapters` into the base and train a fresh one on top."""

    @property
    def continues(self) -> bool:
        """Whether an adapter goes on as it is, instead of a fresh one."""
        return bool(self.adapters) and not self.create_new_adapter

    @property
    def merged_first(self) -> tuple[str, ...]:
        """Those of `adapters` that are added into the base below the one that trains."""
        return self.adapters[:-1] if self.continues else self.adapters


class TargetedSpec(AdapterSpec):
    """An adapter on layers that the recipe names."""

    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, a list of module names, or one regular expression over full module names."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter and saved with it."""


LoraInit = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "loftq"]

_OF_AN_INIT = {
    "calibration_samples": ("eva", "corda"),
    "eva_rho": ("eva",),
    "eva_tau": ("eva",),
    "corda_mode": ("corda",),
}
_OF_A_FRESH_ADAPTER = (
    "rslora",
    "dora",
    "init",
    "bias",
    "layers",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "trainable_tokens",
)


class LoraSpec(TargetedSpec):
    """Low-rank adapters through PEFT (Hu et al., 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=8, gt=0)
    alpha: float | None = Field(default=None, gt=0)
    """Scale is alpha / rank; absent: 2 x rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    """Scale is alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732): larger ranks keep learning."""
    dora: bool = False
    """The length of every row of the weight trains apart from its direction (DoRA, arXiv:2402.09353)."""
    init: LoraInit = "default"
    """How A and B start. `pissa` (arXiv:2404.02948): the largest singular vectors of the weight; `olora`
    (arXiv:2406.01775): its QR factors; `corda` (arXiv:2406.05223): its factors where the run's data is large or small.
    What is saved of these three is a plain LoRA of twice the rank for the untouched base. `eva` (arXiv:2410.07170): A
    from the directions of the layers' inputs on the run's data. `loftq` (arXiv:2310.08659): what rounding took off a
    quantized base, in one iteration."""
    init_iterations: int | None = Field(default=None, gt=0)
    """With `init: pissa` and `loftq`: this many iterations of a fast, approximate SVD; absent: the exact one."""
    calibration_samples: int = Field(default=256, gt=0)
    """With `init: eva` and `corda`: how many samples they look at before the first step, in the run's order."""
    eva_rho: float = Field(default=2.0, ge=1)
    """With `init: eva`: no layer gets more than this many times its rank when ranks go where the inputs spread over
    more directions; their sum stays. 1: every layer keeps its rank."""
    eva_tau: float = Field(default=0.99, gt=0, lt=1)
    """With `init: eva`: directions stand still when their cosine with those of the pass before is this or more."""
    corda_mode: Literal["ipm", "kpm"] = "ipm"
    """With `init: corda`: `ipm` starts from what matters most to the run's data (instruction-previewed), `kpm` from
    what matters least to it, so that the rest stays (knowledge-preserved: give data of what is to be kept)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base train too; they are saved with the adapter."""
    layers: tuple[int, ...] = ()
    """Numbers of the decoder layers that get an adapter; empty: all."""
    layers_pattern: str | None = None
    """Name of the list that `layers` counts in, where it is not the usual one (`layers`, `h`, `blocks`, ...)."""
    rank_pattern: dict[str, int] = {}
    """Ranks of single layers: module name, or regular expression over the end of it, to rank."""
    alpha_pattern: dict[str, float] = {}
    """Alphas of single layers, named like those of `rank_pattern`."""
    target_parameters: tuple[str, ...] = ()
    """Parameters, not modules, that get an adapter: the experts of a mixture (`mlp.experts.down_proj`)."""
    trainable_tokens: tuple[int, ...] = ()
    """Ids of tokens whose rows of the embeddings (and of the head) train; the other rows are frozen."""
    freeze_a: bool = False
    """A stays as it is drawn, B trains (LoRA-FA, arXiv:2308.03303): activations of the inputs are not kept."""
    lora_plus_ratio: float | None = Field(default=None, gt=0)
    """The learning rate of B over that of A (LoRA+, arXiv:2402.12354); absent: 1."""
    lora_plus_embedding_lr: float | None = Field(default=None, ge=0)
    """With `lora_plus_ratio`: the learning rate of B of an adapter on the embeddings; absent: as of the others."""

    @model_validator(mode="after")
    def _goes_together(self) -> LoraSpec:
        if self.continues:
            fields = type(self).model_fields
            given = [name for name in _OF_A_FRESH_ADAPTER if getattr(self, name) != fields[name].default]
            if given:
                raise ValueError(
                    f"{given[0]} is chosen when an adapter is made, and the last of `adapters` is continued as it is; "
                    "remove it, or set create_new_adapter: true"
                )
        converted = self.init in ("pissa", "olora", "corda")
        if self.init_iterations is not None and self.init not in ("pissa", "loftq"):
            raise ValueError("init_iterations belongs to init: pissa and loftq")
        for name, inits in _OF_AN_INIT.items():
            if self.init not in inits and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to init: {' and '.join(inits)}")
        if self.init == "loftq" and self.dora:
            raise ValueError(
                "init: loftq and dora: the lengths that dora trains would be those before loftq; keep one"
            )
        if self.init == "eva" and self.trainable_tokens:
            raise ValueError(
                "init: eva looks at the inputs of layers, and trainable_tokens are none; keep one"
            )
        if converted and self.dora:
            raise ValueError(
                f"init: {self.init} and dora both take the weight apart, each in its way; keep one"
            )
        if self.init != "default" and self.target_parameters:
            raise ValueError("target_parameters takes init: default alone: the others start from modules")
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.rank, *self.rank_pattern.values())):
            raise ValueError("init: orthogonal splits the rank in two halves; give an even rank")
        if self.lora_plus_embedding_lr is not None and self.lora_plus_ratio is None:
            raise ValueError("lora_plus_embedding_lr belongs to lora_plus_ratio")
        if self.layers and isinstance(self.targets, str) and self.targets != "all-linear":
            raise ValueError(
                "layers goes with listed targets or all-linear; an expression names its layers itself"
            )
        if self.layers_pattern is not None and not self.layers:
            raise ValueError("layers_pattern says where `layers` counts, and layers is empty")
        return self


class OftSpec(TargetedSpec):
    """Orthogonal fine-tuning (arXiv:2306.07280, arXiv:2506.19847): inputs of the weight are rotated in blocks."""

    type: Literal["oft"] = "oft"
    block_size: int = Field(default=32, ge=0)
    """Inputs in one block; it must divide the inputs of every layer. 0: `blocks` says it."""
    blocks: int = Field(default=0, ge=0)
    """Blocks of one layer, in place of `block_size`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the blocks that are left unrotated in a training step."""
    neumann_terms: int | None = Field(default=5, gt=0)
    """Terms of the series that replaces the inverse of Cayley's formula; absent: the inverse itself."""

    @model_validator(mode="after")
    def _one_size(self) -> OftSpec:
        if bool(self.block_size) == bool(self.blocks):
            raise ValueError("one of block_size and blocks says how large a block is; set the other to 0")
        return self


class VeraSpec(TargetedSpec):
    """Vector-based random matrix adaptation (arXiv:2310.11454): shared random A and B, trained scales."""

    type: Literal["vera"] = "vera"
    rank: int = Field(default=256, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    """Draws A and B."""
    initial_scale: float = 0.1
    """What the scales of A's rows start from; those of B's start from 0."""


class Ia3Spec(AdapterSpec):
    """Learned factors of keys, values and inner activations ((IA)3, arXiv:2205.05638)."""

    type: Literal["ia3"] = "ia3"
    targets: str | tuple[str, ...] | None = None
    """Layers that get factors; absent: what PEFT names for this kind of model."""
    feedforward: str | tuple[str, ...] | None = None
    """Those of `targets` whose inputs are scaled, not their outputs; absent: PEFT's."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter and saved with it."""

    @model_validator(mode="after")
    def _both_or_none(self) -> Ia3Spec:
        if (self.targets is None) != (self.feedforward is None):
            raise ValueError("give targets and feedforward together, or neither")
        return self


class MissSpec(TargetedSpec):
    """Matrix shard sharing (MiSS, arXiv:2409.15371): one small trained matrix, repeated over the weight's shards."""

    type: Literal["miss"] = "miss"
    rank: int = Field(default=64, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    init: Literal["default", "bat", "mini"] = "default"
    """`bat`: the update is multiplied with the weight; `mini`: smaller, `mini_rank` columns are shared."""
    mini_rank: int = Field(default=1, gt=0)


class PeftSpec(AdapterSpec):
    """Any other tuner of PEFT, by its own name and with its own fields."""

    type: Literal["peft"] = "peft"
    config: dict[str, Any]
    """`peft_type` (BOFT, LOHA, LOKR, ...) and the fields of its configuration class in PEFT."""

    @model_validator(mode="after")
    def _named(self) -> PeftSpec:
        if not isinstance(self.config.get("peft_type"), str):
            raise ValueError("config needs peft_type, the tuner's name in PEFT, as {peft_type: LOHA, r: 8}")
        return self


MethodSpec = Annotated[
    FullSpec | FreezeSpec | LlamaProSpec | LoraSpec | OftSpec | VeraSpec | Ia3Spec | MissSpec | PeftSpec,
    Field(discriminator="type"),
]
