"""A conversation with a model: who said what, how answers are drawn, and the next answer, piece by piece."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.answering import Answerer
from luthier.conversations import MediaKind
from luthier.data.answer_form import Spoken, SpokenStream
from luthier.data.chats import tools_in
from luthier.engine.text import TextStream
from luthier.files import write_whole
from luthier.types import (
    Conversation,
    DataError,
    Generation,
    GenerationError,
    LuthierError,
    Media,
    Message,
    ModelError,
    Request,
    ToolCall,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer's text, or of the reasoning before it; a tool call is a line of text."""

    text: str
    reasoning: bool = False


class Session:
    """What is kept between turns.

    settings: what was said of drawing answers, which comes before what the recipe and the model say. Raises ModelError
    for a reward model, GenerationError for an adapter that is not there.
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        system: str | None = None,
        adapter: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if answerer.kind == "reward":
            raise ModelError(
                f"{answerer.label} is a reward model, which scores answers and gives none; use `luthier score`"
            )
        self.answerer = answerer
        self.settings = dict(settings or {})
        self.messages: list[Message] = []
        self.tools: tuple[Mapping[str, Any], ...] = ()
        self.adapter: str | None = None
        self.last: Generation | None = None
        """How the newest answer ended; None where it was stopped."""
        self.attached: tuple[Media, ...] = ()
        """What the next question shows."""
        self._saved: set[Path] = set()
        self.set_system(system)
        if adapter is not None:
            self.choose(adapter)
        answerer.settings(**self.settings)
        answerer.variables(self.settings)

    # ---- what an answer is made of

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else None
        return first.content if first is not None and first.role == "system" else None

    def set_system(self, text: str | None) -> None:
        """Put a system message before the conversation, in place of the one that is there; None takes it away."""
        rest = self.messages[1:] if self.system is not None else self.messages
        self.messages = [Message("system", text), *rest] if text else list(rest)

    def set_tools(self, path: str | Path | None) -> None:
        """Offer the tools of a JSON file from now on; None takes them away.

        Raises GenerationError for a template that writes calls in no form that is read back, DataError for a file
        that holds no tools.
        """
        if path is None:
            self.tools = ()
            return
        if not self.answerer.form.calls_back:
            raise GenerationError(f"tools are not supported by this model: {self.answerer.form.no_calls}")
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as tools: {error}") from error
        self.tools = tools_in(text, str(path))

    def attach(self, kind: MediaKind, path: str | Path) -> None:
        """Show an image, a film or a sound in front of the next question.

        Raises DataError for a model that takes none of this kind and for a file that is missing or broken,
        GenerationError for an engine that reads text alone.
        """
        template = self.answerer.template
        template.require(kind)
        if not self.answerer.engine.reads_media:
            raise GenerationError(f"this engine takes no {kind}s: start with --engine hf")
        medium = Media(kind, str(Path(path).expanduser().absolute()))
        template.prompt(Conversation((Message("user", "?", media=(medium,)),)))  # which looks at the file
        self.attached = (*self.attached, medium)

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """Calls of the last answer that have no result yet."""
        for results, message in enumerate(reversed(self.messages)):
            if message.role != "tool":
                return message.tool_calls[results:]
        return ()

    def choose(self, adapter: str) -> None:
        """Answer with this adapter from now on. Raises GenerationError where there is none of that name."""
        choices = self.answerer.engine.choices
        if adapter not in choices:
            among = (
                f"choose from {', '.join(choices)}"
                if choices
                else "this model was loaded without others; start with --adapter NAME=FOLDER"
            )
            raise GenerationError(f"there is no adapter {adapter!r}; {among}")
        self.adapter = adapter

    def change(self, settings: Mapping[str, Any]) -> None:
        """Settings for the answers from now on; None goes back to what the recipe and the model say.

        Raises GenerationError, and changes nothing, where they are out of range, and DataError where the chat template
        does not know what they set of it.
        """
        changed = {
            name: value for name, value in (self.settings | dict(settings)).items() if value is not None
        }
        self.answerer.settings(**changed)
        self.answerer.variables(changed)
        self.settings = changed

    def request(self) -> Request:
        """The request for the next answer. Raises GenerationError for a conversation that leaves it no room."""
        request = self.answerer.request(
            Conversation(tuple(self.messages), self.tools), adapter=self.adapter, **self.settings
        )
        limits = (self.answerer.engine.context_length, request.settings.max_length)
        room = min((limit for limit in limits if limit is not None), default=None)
        if room is not None and len(request.prompt) >= room:
            raise GenerationError(
                f"the conversation has {len(request.prompt)} tokens, and {room} is all that question and answer may "
                "have together: /undo takes the last turn back, /clear begins anew"
            )
        self.answerer.engine.limit(request)
        return request

    # ---- turns

    def ask(self, text: str) -> Iterator[Piece]:
        """The answer to `text`, and to what is attached. What cannot be asked leaves the conversation as it was.

        An iterator that is closed before its end stops the answer; what was said of it stays. Raises GenerationError
        and DataError for what cannot be answered.
        """
        self.messages.append(Message("user", text, media=self.attached))
        try:
            request = self.request()
        except LuthierError:
            self.messages.pop()
            raise
        self.attached = ()
        return self._answer(request)

    def result(self, text: str) -> Iterator[Piece] | None:
        """What the tool says to the first call that waits; the answer to it once none waits any more.

        Raises GenerationError where no call waits.
        """
        if not self.open_calls:
            raise GenerationError("no tool was called; /result answers a call")
        call = self.open_calls[0]
        self.messages.append(Message("tool", text, name=call.name, tool_call_id=call.id))
        if self.open_calls:
            return None
        try:
            request = self.request()
        except LuthierError:
            self.messages.pop()
            raise
        return self._answer(request)

    def retry(self) -> Iterator[Piece]:
        """Another answer to the last question, in place of the one that was given.

        Raises GenerationError where there is none.
        """
        question = self._last("user")
        kept, self.messages = self.messages, self.messages[: question + 1]
        try:
            request = self.request()
        except LuthierError:
            self.messages = kept
            raise
        return self._answer(request)

    def undo(self) -> str:
        """Take the last question and its answer back; the question. Raises GenerationError where there is none."""
        question = self._last("user")
        text = self.messages[question].content
        self.messages = self.messages[:question]
        return text

    def clear(self) -> None:
        """Begin anew, with the same system message and nothing attached."""
        self.attached = ()
        self.messages = [message for message in self.messages[:1] if message.role == "system"]

    def _last(self, role: str) -> int:
        found = [number for number, message in enumerate(self.messages) if message.role == role]
        if not found:
            raise GenerationError("nothing was asked yet")
        return found[-1]

    def _answer(self, request: Request) -> Iterator[Piece]:
        answerer, self.last = self.answerer, None
        decode = answerer.decoder(skip_special_tokens=self.settings.get("skip_special_tokens"))
        form = answerer.form_after(request)
        offered = {t["function"]["name"]: t["function"].get("parameters") or {} for t in self.tools}
        stream, parts, text = TextStream(decode, request.settings.stop), SpokenStream(form, offered), ""
        try:
            for event in answerer.engine.stream(request):
                if event.choice is not None:
                    piece = stream.push(event.choice.token)
                    text += piece
                    yield from _pieces(parts.push(piece))
                self.last = event.end
            piece = stream.finish()
            text += piece
            yield from _pieces(parts.push(piece, ended=True))
        finally:
            if text or self.last is not None:
                self.messages.append(_with_ids(answerer.message(text, form, offered)))
            else:
                self.messages.pop()

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Write the conversation as one line of JSON: a row of a data set in OpenAI's messages format.

        A file that this session did not write is not replaced. Raises DataError.
        """
        file = Path(path).expanduser()
        if not any(message.role == "assistant" for message in self.messages):
            raise DataError("there is no answer yet that could be saved")
        if file.exists() and file.resolve() not in self._saved:
            raise DataError(f"{file} exists already; choose another name")
        talk: dict[str, Any] = {"messages": [_row(message) for message in self.messages]}
        row = json.dumps(talk | ({"tools": list(self.tools)} if self.tools else {}), ensure_ascii=False)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, row + "\n")
        except OSError as error:
            raise DataError(f"{file} cannot be written: {error.strerror}") from error
        self._saved.add(file.resolve())
        return file


def _pieces(added: Spoken) -> Iterator[Piece]:
    if added.reasoning:
        yield Piece(added.reasoning, reasoning=True)
    if added.content:
        yield Piece(added.content)
    for call in added.calls:
        yield Piece(f"\n[call] {call.name} {json.dumps(call.arguments, ensure_ascii=False)}")


def _with_ids(message: Message) -> Message:
    """Calls with ids, which some templates ask for: nine letters and digits, which is what Mistral's take."""
    calls = tuple(replace(call, id=call.id or secrets.token_hex(5)[:9]) for call in message.tool_calls)
    return replace(message, tool_calls=calls)


def _row(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.media:
        shown = [{"type": one.kind, one.kind: one.source} for one in message.media]
        row["content"] = [*shown, {"type": "text", "text": message.content}]
    if message.tool_calls:
        row["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.role == "tool":
        row |= {"name": message.name, "tool_call_id": message.tool_call_id}
    return row if message.reasoning is None else row | {"reasoning_content": message.reasoning}
