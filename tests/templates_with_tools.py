"""Chat templates that have places for tools and reasoning, in the forms that families use."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec
from tests.tiny import chat_tokenizer

_HEAD = (
    "{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
)
_TAIL = (
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_REASON = "{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}"
_CONTENT = "{{- message['content'] }}"
_HERMES = (
    "{%- for call in message.tool_calls or [] %}"
    "{{- '\\n' if message['content'] or not loop.first else '' }}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
)
_LIST = (
    "{%- if message.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for call in message.tool_calls %}"
    '{{- \'{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) }}'
    "{{- ', \"id\": \"' + call.id + '\"}' }}{{- ', ' if not loop.last else ']' }}{%- endfor %}{%- endif %}"
)
_BARE = (
    "{%- for call in message.tool_calls or [] %}"
    "{{- '{\"name\": \"' + call.function.name + '\", \"parameters\": ' + (call.function.arguments | tojson) + '}' }}"
    "{%- endfor %}"
)
_TEXT = (
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<function=' + call.function.name + '>' }}"
    "{%- for key, value in call.function.arguments.items() %}{{- '<' + key + '>' + value }}{%- endfor %}"
    "{%- endfor %}"
)

HERMES = _HEAD + _REASON + _CONTENT + _HERMES + _TAIL
LIST = _HEAD + _CONTENT + _LIST + _TAIL
BARE = _HEAD + _CONTENT + _BARE + _TAIL
TEXT = _HEAD + _CONTENT + _TEXT + _TAIL
OPENED = (
    _HEAD
    + "{%- if message['role'] == 'assistant' %}{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}"
    + _CONTENT
    + _TAIL.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
)
"""Its prompt begins the reasoning."""


def tokenizer_with(source: str) -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = source
    return tokenizer


def template_with(source: str) -> ChatTemplate:
    return load_template(tokenizer_with(source), DataSpec())
