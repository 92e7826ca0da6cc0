"""What requests may say, field by field. One that is unknown, or that the engine cannot hold, is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from luthier.api.parts import Part
from luthier.api.strict import Strict

HARMLESS = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "verbosity",
    }
)
"""Fields of OpenAI's that ask nothing of an answer: read over."""

PROBLEMS = frozenset(
    {
        "refused",
        "unknown",
        "unreadable",
        "media",
        "content",
        "assistant",
        "tool",
        "strict",
        "format",
        "stream_options",
        "top_logprobs",
        "tool_choice",
    }
)
"""Kinds of problems that the classes below find themselves."""

_SEED = 2**63 - 1
_MAX_STOPS, _MAX_CHOICES = 16, 128
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Text = Annotated[str, Field(max_length=64)]


class Body(Strict):
    """What all requests have in common. `model`: a name that /v1/models lists."""

    ignored = HARMLESS
    model: Annotated[str, Field(max_length=512)]

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise PydanticCustomError(
                "unreadable", "the text has half a surrogate pair in it, or is nested too deep"
            ) from error
        return value


class StreamOptions(Strict):
    """Of a stream. `include_usage`: the counts come in a last chunk."""

    ignored = frozenset({"include_obfuscation"})
    include_usage: bool = False


class Drawing(Body):
    """How an answer is drawn. What is absent is as the recipe, then the model's generation_config.json says."""

    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    """Extension; 0 and -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Extension."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    """Extension."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-_SEED, le=_SEED)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_streams(self) -> Drawing:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is for stream: true")
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def call(self) -> dict[str, Any]:
        """What this request says of drawing, in the engine's words."""
        names = (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
        )
        said: dict[str, Any] = {name: getattr(self, name) for name in names}
        said["max_new_tokens"] = self.max_tokens
        said["top_k"] = None if self.top_k is None else max(self.top_k, 0)
        said["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return said


class CalledFunction(Strict):
    """`arguments` is JSON as text."""

    name: _Text
    arguments: str


class Called(Strict):
    """A call that the assistant made earlier."""

    id: Annotated[str, Field(max_length=128)] | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatTurn(Strict):
    """A message. `reasoning_content` belongs to assistants, `tool_call_id` and `name` to tools."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _belongs(self) -> ChatTurn:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("content", "a message needs content")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise PydanticCustomError(
                "assistant", "tool_calls and reasoning_content belong to assistant messages"
            )
        if self.role != "tool" and (self.tool_call_id is not None or self.name is not None):
            raise PydanticCustomError("tool", "tool_call_id and name belong to tool messages")
        return self

    def turn(self) -> dict[str, Any]:
        """The message as a data file in OpenAI's format would have it."""
        turn = self.model_dump(exclude_none=True)
        # `developer` is OpenAI's newer word, which chat templates do not know.
        return turn | ({"role": "system"} if self.role == "developer" else {})


class ToolFunction(Strict):
    """A function that may be called; `parameters` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _not_held(self) -> ToolFunction:
        if self.strict:
            raise PydanticCustomError(
                "strict", "strict is not supported: an answer cannot be held to a schema"
            )
        return self


class Tool(Strict):
    """What the assistant may call."""

    type: Literal["function"]
    function: ToolFunction
    _given: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _kept(cls, value: Any, handler: ModelWrapValidatorHandler[Tool]) -> Tool:
        tool = handler(value)
        if isinstance(value, dict):
            tool._given = value
        return tool

    def given(self) -> Mapping[str, Any]:
        """The tool as it was written: templates show it as JSON, so the order of its keys makes its tokens."""
        return self._given


class ResponseFormat(BaseModel):
    """The form of an answer; only `text`, which is none, can be held."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: str

    @model_validator(mode="after")
    def _held(self) -> ResponseFormat:
        if self.type != "text":
            raise PydanticCustomError(
                "format",
                "{kind} is not supported: an answer cannot be held to a format",
                {"kind": self.type[:40]},
            )
        return self


class ChatRequest(Drawing):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatTurn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """The same as max_tokens, and before it."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    reasoning_effort: _Text | None = None
    """Where the chat template reads it."""
    chat_template_kwargs: Annotated[dict[_Text, Any], Field(max_length=16)] | None = None
    """Extension: variables of the chat template, such as enable_thinking."""
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _held(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs is for logprobs: true")
        if self.tool_choice is not None and not self.tools and self.tool_choice != "none":
            raise PydanticCustomError("tool_choice", "tool_choice is for requests with tools")
        if self.tool_choice not in (None, "auto", "none"):
            raise PydanticCustomError(
                "tool_choice", "tool_choice can be auto or none: an answer cannot be held to a call"
            )
        return self

    def call(self) -> dict[str, Any]:
        said = super().call()
        said["max_new_tokens"] = self.max_completion_tokens or self.max_tokens
        said["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return said

    def variables(self) -> dict[str, Any]:
        """What it says of the chat template's variables."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}


_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Drawing):
    """POST /v1/completions. `prompt`: one or several, as text or as token ids."""

    prompt: (
        str | _Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[_Ids], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def call(self) -> dict[str, Any]:
        return super().call() | {"logprobs": self.logprobs}

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if one else list(prompt)


class ScoreRequest(Body):
    """POST /v1/score. `input`: conversations, each of which ends with the answer that is scored."""

    input: Annotated[
        list[Annotated[list[ChatTurn], Field(min_length=2)]], Field(min_length=1, max_length=1024)
    ]
