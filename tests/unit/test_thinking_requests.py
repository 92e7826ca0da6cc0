"""enable_thinking and other variables of a template, from whoever asks: chat, serve, predict."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from luthier.answering import Answerer
from luthier.api.faults import ApiError
from luthier.api.fields import ChatRequest
from luthier.api.served import Served
from luthier.chat.commands import run_command
from luthier.chat.session import Session
from luthier.recipe.schema import GenerationSpec
from luthier.types import Conversation, DataError, GenerationSettings, Message, RecipeError
from tests.tiny import CHATML
from tests.unit.test_thinking import EMPTY, QWEN3, loaded, source

ASKED = Conversation((Message("user", "q"),))


class Silent:
    """An engine that is never asked."""

    adapters: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    context_length = None

    def limit(self, request: Any) -> None:
        """Nothing is too long."""


def answerer(template: str = QWEN3, **generation: Any) -> Answerer:
    source_ = source(template) if "{" not in template else template
    trained = cast(Any, SimpleNamespace(kind="language"))
    return Answerer("m", cast(Any, Silent()), loaded(source_), trained, GenerationSpec(**generation))


def ends_empty(answers: Answerer, prompt: tuple[int, ...]) -> bool:
    return answers.template.decode(list(prompt)).endswith(EMPTY)


def test_the_recipe_and_before_it_the_call() -> None:
    plain, off = answerer(), answerer(enable_thinking=False)
    assert not ends_empty(plain, plain.request(ASKED).prompt)
    assert ends_empty(plain, plain.request(ASKED, enable_thinking=False).prompt)
    assert ends_empty(off, off.request(ASKED).prompt)
    assert not ends_empty(off, off.request(ASKED, enable_thinking=True).prompt)
    assert off.request(ASKED).settings == GenerationSettings(
        max_new_tokens=512, stop_ids=off.template.stop_ids
    )
    with pytest.raises(DataError, match="does not know enable_thinking"):
        answerer(CHATML, enable_thinking=False).request(ASKED)
    with pytest.raises(DataError, match="does not know reasoning_effort"):
        plain.request(ASKED, reasoning_effort="high")


def test_serve_takes_the_fields_of_the_openai_servers() -> None:
    served = Served("m", answerer())

    def asked(**said: Any) -> Any:
        body = {"model": "m", "messages": [{"role": "user", "content": "q"}], **said}
        return served.chat(ChatRequest.model_validate(body))[0]

    assert not ends_empty(served.answerer, asked().prompt)
    assert ends_empty(served.answerer, asked(chat_template_kwargs={"enable_thinking": False}).prompt)
    for said, where, why in (
        (
            {"chat_template_kwargs": {"thinking_budget": 3}},
            "chat_template_kwargs",
            "does not know thinking_budget",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "own input"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "does not know reasoning_effort"),
    ):
        with pytest.raises(ApiError, match=why) as caught:
            asked(**said)
        assert caught.value.status == 400 and caught.value.body["error"]["param"] == where


def test_chat_sets_it_for_the_answers_that_follow() -> None:
    session = Session(answerer())
    session.messages = list(ASKED.messages)
    for word, empty in (("thinking off", True), ("thinking on", False), ("enable_thinking=false", True)):
        assert "enable_thinking" in run_command(session, f"/set {word}").note
        assert ends_empty(session.answerer, session.request().prompt) is empty
    run_command(session, "/set thinking null")
    assert session.settings == {} and not ends_empty(session.answerer, session.request().prompt)
    with pytest.raises(RecipeError, match="enable_thinking"):
        run_command(session, "/set thinking maybe")
    other = Session(answerer(CHATML))
    with pytest.raises(DataError, match="does not know enable_thinking"):
        run_command(other, "/set thinking off")
    assert other.settings == {}
