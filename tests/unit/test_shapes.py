"""Conversations laid out from one rendering of their kind: as by rendering each, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from luthier.data import families
from luthier.data.rendering import ChatMessage, Layout, Renderer
from luthier.data.shapes import Shapes
from luthier.types import DataError

RENDERED = ("gpt_oss", "seed_oss")
"""Templates that put text together in a way that would hide what they look into."""

ENDS = (
    "</s>",
    *{
        token
        for name in families.names()
        for token in (families.find(name).eos, *families.find(name).stop)
        if token
    },
)
LOOP = "{% for m in messages %}[{{ m.role }}]SHOWN</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def loop(shown: str) -> str:
    return LOOP.replace("SHOWN", shown)


PLAIN = loop("{{ m.content }}")


@cache
def shapes_of(source: str) -> tuple[Renderer, Shapes]:
    renderer = Renderer(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return renderer, Shapes(renderer, laid_out, ENDS)


def laid_out(renderer: Renderer, messages: Sequence[ChatMessage], tools: Sequence[Any]) -> Layout:
    return renderer.layout(messages, tools, ENDS)


def chat(*contents: str, system: str | None = None) -> list[ChatMessage]:
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONTENT = st.sampled_from(
    ["Hi", " a ", "", "\n", "x </think> y", "[user]", "</s", "{{ m }}", "é 北京", "<think>"]
) | st.text(max_size=8)
NAMES = (
    *(
        "alpaca",
        "baichuan2",
        "bailing_v2",
        "chatglm3",
        "chatml",
        "cohere",
        "deepseekr1",
        "gemma",
        "gemma4",
        "glm4_moe",
    ),
    *(
        "gpt_oss",
        "llama2",
        "llama3",
        "minimax2",
        "mistral",
        "phi4",
        "qwen",
        "qwen3",
        "qwen3_5",
        "seed_oss",
        "solar",
    ),
    *("vicuna", "zephyr"),
)
SOURCES = {name: str(families.find(name).source) for name in NAMES} | {
    "plain": PLAIN,
    "trimmed": loop("{{ m.content | trim }}"),
    "trimmed with more": loop("{{ (m.role + m.content) | trim }}"),
    "if given": loop("{% if m.content %}{{ m.content }}{% else %}nothing{% endif %}"),
    "if thought": loop("{% if '</think>' in m.content %}thought{% else %}{{ m.content }}{% endif %}"),
    "generation": LOOP.replace("SHOWN</s>", "{% generation %}{{ m.content }}</s>{% endgeneration %}")
    .replace("{% generation %}", "{% if m.role == 'assistant' %}{% generation %}", 1)
    .replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}", 1),
    "macro unused": "{% macro show(t) %}{{ t | tojson }}{% endmacro %}{% if tools %}{{ show(tools) }}{% endif %}"
    + PLAIN,
    "string or parts": loop(
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    ),
}


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=25, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6), system=st.none() | CONTENT)
def test_as_by_rendering(name: str, contents: list[str], system: str | None) -> None:
    renderer, shapes = shapes_of(SOURCES[name])
    messages = chat(*contents[: len(contents) // 2 * 2], system=system)
    found = shapes.layout(messages)
    if found is not None:
        assert found == laid_out(renderer, messages, ())


@pytest.mark.parametrize("name", SOURCES)
def test_words_alone_are_not_rendered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, shapes = shapes_of(SOURCES[name])
    words = chat("Hello.", "So", "it", "goes\n\non")
    try:
        expected = laid_out(renderer, words, ())
    except DataError:  # other ends than this test knows, or one turn alone
        expected = None
    found = shapes.layout(chat("a", "b", "c", "d"))
    if expected is None or expected.rewritten:
        assert found is None
        return
    monkeypatch.setattr(Renderer, "render", None)
    assert (shapes.layout(words) == expected) if found is not None else name in RENDERED


@pytest.mark.parametrize(
    "looks",
    [
        "{{ m.content | length }}",
        "{{ m.content[:3] }}",
        "{{ m.content | upper }}",
        "{{ m.content.split('a')[0] }}",
        "{{ m.content | replace('a', 'b') }}",
        "{% if m.content == 'a' %}x{% endif %}{{ m.content }}",
        "{% if m.content in ['a'] %}x{% endif %}{{ m.content }}",
        "{% if m.content < 'b' %}x{% endif %}{{ m.content }}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{{ m | tojson }}",
        "{{ [m.content] | join }}",
        "{{ '%s' | format(m.content) }}",
        "{% set t %}{{ m.content }}{% endset %}{{ t | trim }}",
        "{{ (m.role ~ m.content) | trim }}",
        "{% filter trim %}{{ m.content }}{% endfilter %}",
        "{{ m.content.strip('a') }}",
        "{{ ('a ' + m.content + ' ') | trim }}",
        "{{ m.content * 2 }}",
        "{{ m.content }}{{ strftime_now('%Y') }}",
        "{% if m.content.startswith('a') %}x{% endif %}{{ m.content }}",
        "{% macro show(x) %}{{ x }}{% endmacro %}{{ show(m.content) | trim }}",
        "{% if messages | selectattr('content', 'equalto', 'a') | list %}x{% endif %}{{ m.content }}",
    ],
)
def test_templates_that_look_into_contents_are_rendered(looks: str) -> None:
    _, shapes = shapes_of(loop(looks))
    assert shapes.layout(chat("a", "b")) is None


def test_what_a_template_asks_is_a_condition() -> None:
    _, trims = shapes_of(SOURCES["trimmed"])
    assert trims.layout(chat("a", "b")) is not None
    assert trims.layout(chat("a ", "b")) is None and trims.layout(chat("a", "")) is None
    _, given_ = shapes_of(SOURCES["if given"])
    assert given_.layout(chat("a", "")) is None
    _, thinks = shapes_of(SOURCES["if thought"])
    assert thinks.layout(chat("a", "hm</think>b")) is None
    _, plain = shapes_of(PLAIN)
    assert plain.layout(chat(" a", "")) is not None
    assert plain.layout(chat("a</s>", "b")) is None, "the end of an answer is looked for in the text"


def test_more_than_words_is_rendered() -> None:
    _, shapes = shapes_of(PLAIN)
    assert shapes.layout([{"role": "user", "content": "a", "name": "b"}]) is None


def test_a_template_that_cannot_be_trained_says_so_by_rendering() -> None:
    renderer, shapes = shapes_of("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert shapes.layout(chat("a", "b")) is None
    with pytest.raises(DataError):
        laid_out(renderer, chat("a", "b"), ())
