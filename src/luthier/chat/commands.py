"""What a line that begins with a slash does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from luthier.chat.session import Piece, Session
from luthier.conversations import MediaKind
from luthier.recipe.problems import nearest
from luthier.recipe.settings import SETTINGS, read_settings
from luthier.types import GenerationError


@dataclass(frozen=True, slots=True)
class Outcome:
    """What to say, what to show of an answer, and whether that was all."""

    note: str = ""
    answer: Iterator[Piece] | None = None
    leaves: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """How it is written, what it does, and the function that does it."""

    usage: str
    about: str
    run: Callable[[Session, str], Outcome]


def run_command(session: Session, line: str) -> Outcome:
    """Do what a line like `/set temperature 0.7` says. Raises LuthierError for what cannot be done."""
    name, _, rest = line.removeprefix("/").partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = nearest(name, list(COMMANDS))
        hint = f"did you mean /{near}?" if near else "/help lists them all"
        raise GenerationError(f"there is no command /{name}; {hint} (//{name} says it to the model)")
    return command.run(session, rest.strip())


def _attaching(kind: MediaKind) -> Callable[[Session, str], Outcome]:
    def attach(session: Session, rest: str) -> Outcome:
        if rest == "none":
            session.attached = ()
        elif rest:
            session.attach(kind, rest)
        named = ", ".join(str(one.source) for one in session.attached)
        return Outcome(
            f"the next question shows {named}" if named else f"nothing is attached; /{kind} FILE shows one"
        )

    return attach


def _clear(session: Session, rest: str) -> Outcome:
    session.clear()
    return Outcome("the conversation begins anew" + (", with its system message" if session.system else ""))


def _system(session: Session, rest: str) -> Outcome:
    if not rest:
        said = session.system
        return Outcome("there is no system message" if said is None else f"system message: {said}")
    session.set_system(None if rest == "none" else rest)
    return Outcome("system message taken away" if rest == "none" else "system message set")


def _tools(session: Session, rest: str) -> Outcome:
    if rest:
        session.set_tools(None if rest == "none" else rest)
    named = ", ".join(tool["function"]["name"] for tool in session.tools)
    return Outcome(
        f"tools: {named}" if named else "there are no tools; /tools FILE offers those of a JSON file"
    )


def _result(session: Session, rest: str) -> Outcome:
    answer = session.result(rest)
    waits = "" if answer else f"and what does {session.open_calls[0].name} say? (/result TEXT)"
    return Outcome(waits, answer)


def _save(session: Session, rest: str) -> Outcome:
    if not rest:
        raise GenerationError("where to? Write /save FILE, for example /save talk.jsonl")
    file = session.save(rest)
    return Outcome(f"saved: {file} (data.train: [{{file_name: {file.name}, formatting: openai}}])")


def _retry(session: Session, rest: str) -> Outcome:
    answer = session.retry()
    settings = session.answerer.settings(**session.settings)
    same = settings.temperature == 0 or settings.seed is not None
    hint = "temperature 0.7" if settings.temperature == 0 else "seed null"
    return Outcome(f"the same settings draw the same answer; /set {hint} for others" if same else "", answer)


def _undo(session: Session, rest: str) -> Outcome:
    return Outcome(f"taken back: {session.undo()}")


def _adapter(session: Session, rest: str) -> Outcome:
    choices = session.answerer.engine.choices
    if rest or not choices:
        session.choose(rest)
        return Outcome(f"answers come from {rest} now")
    now = session.adapter or choices[0]
    return Outcome("adapters: " + ", ".join(f"{name} (now)" if name == now else name for name in choices))


def _set(session: Session, rest: str) -> Outcome:
    name, equals, value = rest.partition("=" if "=" in rest.split(" ", 1)[0] else " ")
    if not rest:
        return Outcome(settings_line(session))
    if not equals:
        raise GenerationError(f"write /set NAME VALUE, with a NAME of {', '.join(SETTINGS)}")
    name = "enable_thinking" if name.strip() == "thinking" else name.strip()
    session.change(read_settings([f"{name}={value.strip()}"]))
    return Outcome(settings_line(session))


def _help(session: Session, rest: str) -> Outcome:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:{width}}  {command.about}" for command in COMMANDS.values()]
    return Outcome(
        "\n".join(
            [
                *lines,
                'A line that ends with \\ goes on in the next one; """ begins and ends several lines.',
                "Ctrl-C stops an answer; what was said of it stays. Ctrl-D leaves.",
            ]
        )
    )


def _exit(session: Session, rest: str) -> Outcome:
    return Outcome(leaves=True)


def settings_line(session: Session) -> str:
    """How the next answer will be drawn, in one line."""
    settings = session.answerer.settings(**session.settings)
    drawn = (
        f"temperature {settings.temperature:g}, top_p {settings.top_p:g}, top_k {settings.top_k}"
        if settings.temperature
        else "greedy (temperature 0)"
    )
    shown = ("max_new_tokens", "max_length", "min_p", "num_beams", "repetition_penalty", "presence_penalty")
    plain = type(settings)()
    others = [
        f"{name} {getattr(settings, name)}"
        for name in (*shown, "frequency_penalty", "seed", "stop")
        if name == "max_new_tokens" or getattr(settings, name) != getattr(plain, name)
    ]
    variables = session.answerer.variables(session.settings)
    return ", ".join([drawn, *others, *(f"{name} {value}" for name, value in variables.items())])


COMMANDS: dict[str, Command] = {
    "clear": Command("/clear", "forget the conversation; the system message stays", _clear),
    "system": Command("/system TEXT", "set the system message; none takes it away", _system),
    "tools": Command("/tools FILE", "offer the tools of a JSON file; none takes them away", _tools),
    "result": Command("/result TEXT", "what the tool says that was called", _result),
    "image": Command(
        "/image FILE", "show an image with the next question; none: nothing", _attaching("image")
    ),
    "video": Command("/video FILE", "the same with a film", _attaching("video")),
    "audio": Command("/audio FILE", "the same with a sound", _attaching("audio")),
    "retry": Command("/retry", "answer the last question again", _retry),
    "undo": Command("/undo", "take the last question and its answer back", _undo),
    "set": Command("/set NAME VALUE", "change a setting, as /set temperature 0.7; null undoes it", _set),
    "adapter": Command("/adapter NAME", "answer with another adapter; alone: which there are", _adapter),
    "save": Command("/save FILE", "write the conversation as a row of training data (JSON lines)", _save),
    "help": Command("/help", "show this", _help),
    "exit": Command("/exit", "leave", _exit),
    "quit": Command("/quit", "leave", _exit),
}
