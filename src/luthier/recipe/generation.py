"""The generation part of a recipe: how answers are drawn, and how many at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from luthier.recipe.base import Spec


class GenerationSpec(Spec):
    """How answers are drawn. What is absent here is as the model's generation_config.json says, else the default.

    What a command, a request or a call says comes before this.
    """

    do_sample: bool | None = None
    """Draw tokens; false: always the likeliest. Absent: drawn where `temperature` is given and above 0."""
    temperature: float | None = Field(default=None, ge=0)
    """Of drawing: logits are divided by it. 0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw from the smallest set of tokens whose probabilities sum to this; default 1."""
    top_k: int | None = Field(default=None, ge=0)
    """Draw from this many of the likeliest tokens; 0, the default, is all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Draw from tokens with at least this share of the likeliest one's probability; default 0."""
    num_beams: int | None = Field(default=None, gt=0)
    """Beam search with this many; default 1, none. Much slower: prompts are answered one by one."""
    length_penalty: float | None = None
    """Of beams: scores are divided by the length to this power; default 1."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """The longest answer; default 512."""
    max_length: int | None = Field(default=None, gt=0)
    """The longest prompt and answer together; `max_new_tokens` beside it wins."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """Makes tokens of prompt and answer less likely (arXiv:1909.05858); default 1, not at all."""
    presence_penalty: float | None = None
    """Taken off the logit of every token that the answer has; default 0."""
    frequency_penalty: float | None = None
    """Taken off as often as the answer has it; default 0."""
    seed: int | None = None
    """Of drawing; absent: another one each time."""
    stop: tuple[str, ...] = ()
    """Strings at which an answer ends, beside the template's own ends."""
    enable_thinking: bool | None = None
    """Ask for reasoning, or for none, of a chat template that has both modes; absent: the template's own rule."""
    reasoning_effort: str | None = Field(default=None, min_length=1, max_length=64)
    """How much to reason, in the words of a chat template that reads this (gpt-oss: low, medium, high)."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text of an answer."""
    engine: Literal["hf", "vllm"] = "hf"
    """What answers: transformers, or vLLM in an environment that has it. At evaluations of a training: transformers."""
    rows: int = Field(default=8, gt=0)
    """The most answers under way at once."""
    memory_gib: float | None = Field(default=None, gt=0)
    """What their keys and values may take; absent: half of what is free."""

    @property
    def template_variables(self) -> dict[str, bool | str]:
        """What it sets of the chat template's variables."""
        said = {"enable_thinking": self.enable_thinking, "reasoning_effort": self.reasoning_effort}
        return {name: value for name, value in said.items() if value is not None}

    @property
    def memory(self) -> int | None:
        """`memory_gib` in bytes."""
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)
