"""Chat layouts written as one string for each kind of turn, and the Jinja template that they stand for.

Most models' templates differ in nothing but these strings. `{content}` is the message, `{bos}` and `{eos}` are the
tokenizer's begin and end tokens, and `{cut}` is where LLaMA-Factory tokenizes the text before and behind apart, as
it does around begin and end tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from luthier.data.tool_formats import PLACE

CUT = "{{- cut -}}"
_MARKS = re.compile(r"(\{(?:content|bos|eos|cut)\})")
_TOKENS = {"{bos}": "bos_token", "{eos}": "eos_token"}


@dataclass(frozen=True, slots=True)
class Turns:
    """What is written for each kind of turn.

    `opening` stands before an answer, and is the generation prompt; `begin` stands before all else. After the last
    answer comes `last`, after the others then `earlier`. `system_in_user` puts the system message into the next user
    turn. Without `tool` the template refuses tool results, and has no place for a tool format.
    """

    user: str
    opening: str
    assistant: str = "{content}{eos}"
    system: str = "{content}"
    begin: str = ""
    tool: str | None = None
    last: str = ""
    earlier: str = ""
    system_in_user: bool = False

    @property
    def jinja(self) -> str:
        """The template, with the marks that `families.Family.marked_source` may hold."""
        lines = [PLACE] if self.tool is not None else []
        lines += ["{%- set ns = namespace(system='') -%}"] if self.system_in_user else []
        lines += [_closed(_written(self.begin))] if self.begin else []
        lines += ["{%- for message in messages -%}", "{%- if message['role'] == 'system' -%}"]
        lines += ["{%- if message['content'] -%}", self._system(), "{%- endif -%}"]
        lines += ["{%- elif message['role'] == 'user' -%}", *self._user()]
        lines += ["{%- elif message['role'] == 'assistant' -%}"]
        answer = _written(self.opening + self.assistant)
        lines += [_closed(answer) if self.last else answer]
        if self.last:
            lines += ["{%- if loop.last -%}" + _written(self.last)]
            lines += ["{%- else -%}" + _written(self.earlier)] if self.earlier else []
            lines += ["{%- endif -%}"]
        if self.tool is not None:
            lines += ["{%- elif message['role'] == 'tool' -%}", _written(self.tool)]
        refused = "{{- raise_exception('this template has no role ' + message['role']) -}}"
        lines += ["{%- else -%}", refused, "{%- endif -%}", "{%- endfor -%}"]
        if self.opening:
            lines += ["{%- if add_generation_prompt -%}" + _written(self.opening) + "{%- endif -%}"]
        return "\n".join(line for line in lines if line)

    def _system(self) -> str:
        if self.system_in_user:
            return "{%- set ns.system = " + _expression(self.system) + " -%}"
        return _closed(_written(self.system))

    def _user(self) -> list[str]:
        if not self.system_in_user:
            return [_written(self.user)]
        written = _written(self.user, "ns.system + message['content']")
        return [written, "{%- set ns.system = '' -%}"]


def _written(text: str, content: str = "message['content']") -> str:
    """Jinja statements that write the text."""
    found: list[str] = []
    terms: list[str] = []
    for part in _MARKS.split(text):
        if part in _TOKENS or part == "{cut}":
            found += [_joined(terms)] if terms else []
            terms = []
            found += [CUT] if found and found[-1] != CUT else []
            found += ["{{- " + _TOKENS[part] + " -}}", CUT] if part in _TOKENS else []
        elif part:
            terms.append(content if part == "{content}" else quoted(part))
    return "".join([*found, _joined(terms)] if terms else found)


def _joined(terms: list[str]) -> str:
    return "{{- " + " + ".join(terms) + " -}}"


def _expression(text: str) -> str:
    parts = [part for part in _MARKS.split(text) if part]
    return " + ".join("message['content']" if part == "{content}" else quoted(part) for part in parts)


def _closed(statements: str) -> str:
    return statements if statements.endswith(CUT) else statements + CUT


def quoted(text: str) -> str:
    """The text as a Jinja string."""
    return json.dumps(text, ensure_ascii=False)
