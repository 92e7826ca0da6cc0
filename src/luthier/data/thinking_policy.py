"""A recipe's policy of reasoning as part of the chat template.

    with_thinking(source, spec, variables)   the template with the policy in front (and behind)

The policy is Jinja that changes `messages` before the template sees them, so that the saved template does the same
in training, in serving, and in other software. What a template does by itself is found by rendering made-up answers
(`thinking.Habits`); nothing is added that it does already, and the result is rendered again to see that the policy
holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from luthier.data.thinking import (
    BEGIN,
    END,
    FIELDS,
    POLICY,
    WHY,
    Habits,
    asked,
    field_of,
    knows,
    without_policy,
)
from luthier.recipe.thinking import ThinkingSpec
from luthier.types import DataError


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is put around a template: the actions that it needs so that the policy holds."""

    enable: bool | None = None
    variables: tuple[tuple[str, bool], ...] = ()
    strip_history: bool = False
    strip_all: bool = False
    write_history: bool = False
    empty_last: bool = False
    empty_history: bool = False
    prompt_mode: bool = False


def with_thinking(source: str, spec: ThinkingSpec, variables: Mapping[str, Any]) -> str:
    """The same template, which treats reasoning as the policy says; a policy that it had before is replaced.

    Raises DataError where the template cannot be made to.
    """
    if not spec.in_template:
        return source
    found = POLICY.search(source)
    head = source[: found.start()] if found is not None else ""
    base = without_policy(source)
    own = Habits(base, variables, field_of(base, variables))
    plan = _Plan(enable=spec.enable, strip_all=spec.answers == "none")
    # A template without a non-thinking mode gets one where the recipe wants its empty thought in a prompt.
    wants_mode = spec.empty == "prompt" or spec.enable is False
    plan = replace(plan, prompt_mode=wants_mode and not knows(base, "enable_thinking"))
    if spec.enable and not knows(base, "enable_thinking"):
        raise DataError(
            "data.thinking.enable: the chat template does not know enable_thinking; leave it out, or choose another "
            "template"
        )

    def tried(plan: _Plan) -> Habits:
        return Habits(_assembled(head, base, plan, own), variables, own.field)

    if spec.answers == "none" and WHY in tried(plan).text(asked(), own.answer(WHY)):
        raise DataError("data.thinking: reasoning cannot be taken out of the answers of this chat template")
    plan = _with_history(spec, plan, tried, own.field is not None)
    if spec.empty != "template":
        in_prompt = spec.empty == "prompt"
        if not tried(plan).begins_empty(in_prompt=in_prompt):
            plan = replace(plan, empty_last=True)
        if not tried(plan).begins_empty(in_prompt=in_prompt):
            raise DataError(
                f"data.thinking.empty: {spec.empty} does not go with this chat template: an answer without reasoning "
                "cannot be given an empty thought there; leave it out"
            )
        if spec.history == "keep" and not tried(plan).keeps_empty():
            plan = replace(plan, empty_history=True)
    return _assembled(head, base, plan, own)


def _with_history(
    spec: ThinkingSpec, plan: _Plan, tried: Callable[[_Plan], Habits], has_place: bool
) -> _Plan:
    if spec.history == "strip":
        plan = plan if tried(plan).strips() else replace(plan, strip_history=True)
        if not tried(plan).strips():
            raise DataError("data.thinking.history: strip does not go with this chat template; leave it out")
    if spec.history == "keep" and spec.answers != "none":
        ways = (
            plan,
            replace(plan, variables=(("preserve_thinking", True),)),
            replace(plan, variables=(("clear_thinking", False),)),
            replace(plan, write_history=True),
        )
        if not has_place and tried(plan).keeps_content():
            return plan  # all of it stands in the content, and stays there
        found = next((way for way in ways if tried(way).keeps()), None)
        if found is None or not has_place:
            raise DataError(
                "data.thinking.history: keep does not go with this chat template, which takes reasoning out itself; "
                "leave it out, or choose another template"
            )
        plan = found
    return plan


def _assembled(head: str, base: str, plan: _Plan, own: Habits) -> str:
    """The template with the plan's Jinja before it (but after its own `head`) and after it."""
    front = [
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {str(value).lower()} -%}}{{%- endif -%}}"
        for name, value in (
            *(() if plan.enable is None else (("enable_thinking", plan.enable),)),
            *plan.variables,
        )
    ]
    if plan.strip_history or plan.strip_all or plan.write_history or plan.empty_last or plan.empty_history:
        front.append(_rewriting(plan, own))
    back = ""
    if plan.prompt_mode:
        back = (
            "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
            f"{{{{- {_quoted(own.marks.empty)} -}}}}{{% endif %}}"
        )
    # Jinja drops one newline at a template's end, which must not come back when something follows it.
    body = base[len(head) :]
    body = body.removesuffix("\n") if back else body
    return "".join([head, BEGIN, *front, END, body, *([BEGIN, back, END] if back else [])])


def _rewriting(plan: _Plan, own: Habits) -> str:
    """Jinja that goes through the answers and changes those that the plan names."""
    fields, marks = json.dumps(FIELDS), own.marks
    # a field that is there and empty keeps a template from looking for reasoning in the content
    looked = f", {own.field}=''" if own.field else ""
    bare = f"dict(m.items() | rejectattr(0, 'in', {fields}))"
    strip = f"{{%- set m = dict({bare}, content=turn.said) -%}}{{%- set turn.why = '' -%}}"
    thought = f"{_quoted(marks.opens)} + turn.why.strip('\\n') + {_quoted(marks.closes)}"
    write = f"{{%- set m = dict({bare}, content={thought} + turn.said{looked}) -%}}"
    empty = f"{{%- set m = dict(m, content={_quoted(marks.empty)} + turn.said) -%}}"
    empty_earlier = f"{{%- set m = dict(m, content={_quoted(marks.empty)} + turn.said{looked}) -%}}"
    earlier, current = "loop.index0 < turn.last", "loop.index0 > turn.last"
    rules = (
        (plan.strip_all, "true", strip),
        (plan.strip_history, earlier, strip),
        (plan.write_history, f"{earlier} and turn.why", write),
        (plan.empty_history, f"{earlier} and not turn.why", empty_earlier),
        (plan.empty_last, f"{current} and not turn.why", empty),
    )
    changes = "".join(f"{{%- if {when} -%}}{what}{{%- endif -%}}" for wanted, when, what in rules if wanted)
    why = " or ".join(f"m.get({_quoted(name)})" for name in FIELDS)
    return (
        "{%- set turn = namespace(last=-1, all=[], why='', said='') -%}"
        "{%- for m in messages -%}"
        "{%- if m['role'] == 'user' -%}{%- set turn.last = loop.index0 -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- for m in messages -%}"
        "{%- if m['role'] == 'assistant' and (m['content'] is string or not m['content']) -%}"
        "{%- set turn.said = m['content'] or '' -%}"
        f"{{%- set turn.why = {why} or '' -%}}"
        "{%- if turn.said.lstrip().startswith('<think>') and '</think>' in turn.said -%}"
        "{%- set turn.why = turn.why or turn.said.lstrip().partition('</think>')[0][7:].strip('\\n') -%}"
        "{%- set turn.said = turn.said.partition('</think>')[2].lstrip('\\n') -%}"
        "{%- endif -%}"
        f"{changes}"
        "{%- endif -%}"
        "{%- set turn.all = turn.all + [m] -%}"
        "{%- endfor -%}"
        "{%- set messages = turn.all -%}"
    )


def _quoted(text: str) -> str:
    """The text as a Jinja string."""
    return json.dumps(text, ensure_ascii=False)
