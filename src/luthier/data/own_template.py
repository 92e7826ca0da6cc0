"""Whether the chat template that a recipe names writes what the tokenizer's own would.

The named one is trained and saved. Who fine-tunes an instruction model with another layout than it was made with should
know it, so both texts are shown once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.data.rendering import ChatMessage, Renderer
from luthier.data.template import ChatTemplate
from luthier.types import RowError

_TURNS: tuple[ChatMessage, ...] = (
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "It is sunny."},
)
_SYSTEM: ChatMessage = {"role": "system", "content": "Be brief."}


@dataclass(frozen=True, slots=True)
class OwnTemplate:
    """A tokenizer's chat template and special tokens, before a recipe's template takes their place."""

    renderer: Renderer

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> OwnTemplate | None:
        """None for a tokenizer without a chat template."""
        template: Any = tokenizer.chat_template
        source = template.get("default") if isinstance(template, dict) else template
        return cls(Renderer(source, dict(tokenizer.special_tokens_map))) if source else None

    def difference(self, template: ChatTemplate) -> str | None:
        """Both texts of the first short conversation that `template` writes otherwise; None where there is none.

        Compared are a conversation with a system message, the same without, and their prompts.
        """
        named = Renderer(str(_default(template)), dict(template.tokenizer.special_tokens_map))
        refused = None
        for messages in ((_SYSTEM, *_TURNS), _TURNS, (_SYSTEM, *_TURNS[:-1]), _TURNS[:-1]):
            asked = messages[-1]["role"] == "user"
            try:
                wanted = named.render(messages, generation_prompt=asked)
            except RowError:
                continue
            try:
                own = self.renderer.render(messages, generation_prompt=asked)
            except RowError as error:
                refused = refused or str(error)
                continue
            if own != wanted:
                return (
                    f"data.template={template.name} is trained and saved in place of the tokenizer's own chat "
                    f"template, and writes otherwise\n  {template.name}: {wanted!r}\n  its own: {own!r}"
                )
        if refused is None:
            return None
        return (
            f"data.template={template.name} is trained and saved in place of the tokenizer's own chat template, "
            f"which does not write every conversation that this one writes: {refused}"
        )


def _default(template: ChatTemplate) -> Any:
    source: Any = template.tokenizer.chat_template
    return source["default"] if isinstance(source, dict) else source
