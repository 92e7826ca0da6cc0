"""The tokens that end what the assistant says, found by rendering a short answer and a short tool call."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer

from luthier.data.rendering import ChatMessage, Renderer
from luthier.types import RowError

_ASKED: ChatMessage = {"role": "user", "content": "How?"}
_SAID = "Thus."
_CALL = {"type": "function", "id": "call00000", "function": {"name": "answer", "arguments": {"text": _SAID}}}
_TEXT = {"type": "string", "description": "Text."}
_TOOL = {
    "type": "function",
    "function": {
        "name": "answer",
        "description": "Answers.",
        "parameters": {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]},
    },
}


def end_texts(
    renderers: Mapping[str, Renderer], backend: Tokenizer, eos: str, mark: str = ""
) -> tuple[str, ...]:
    """Spellings of the tokens that end an answer, and a message with tool calls where that differs.

    An answer ends with the first added token after its text; a call, whose format may have tokens of its own, with
    the special token that the template writes last. `eos` stands for an answer that ends with no added token.
    `mark`, if any, is taken out of what the template renders.
    """
    added = [token for token in backend.get_added_tokens_decoder().values() if token.content]
    said: ChatMessage = {"role": "assistant", "content": _SAID}
    try:
        tail = renderers["default"].render([_ASKED, said]).rpartition(_SAID)[2].replace(mark, "")
    except RowError:
        return (eos,)
    found = [
        (tail.find(token.content), -len(token.content), token.content)
        for token in added
        if token.content in tail and not token.content.isspace()
    ]
    special = [token.content for token in added if token.special]
    return tuple(dict.fromkeys([min(found)[2] if found else eos, *_call_end(renderers, special, mark)]))


def _call_end(renderers: Mapping[str, Renderer], special: list[str], mark: str) -> list[str]:
    renderer = renderers.get("tool_use") or renderers["default"]
    if "tool_calls" not in renderer.source:
        return []
    asks: ChatMessage = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    try:
        tail = renderer.render([_ASKED, asks], [_TOOL]).rpartition(_SAID)[2]
    except RowError:
        return []
    tail = tail.replace(mark, "").strip()
    return sorted((token for token in special if tail.endswith(token)), key=len)[-1:]
