"""The verb chat: open a model, then turn after turn until the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from luthier.answering import open_model
from luthier.chat.commands import COMMANDS, run_command, settings_line
from luthier.chat.session import Session
from luthier.chat.terminal import Terminal
from luthier.recipe.settings import read_settings
from luthier.show import quiet_libraries
from luthier.types import LuthierError


def chat(
    target: str | Path,
    settings: Sequence[str] = (),
    *,
    adapters: Mapping[str, str | Path] | None = None,
    base: str | None = None,
    template: str | None = None,
    system: str | None = None,
    device: str | None = None,
    engine: Literal["hf", "vllm"] | None = None,
) -> bool:
    """Talk to what `target` names (see `open_model`) until its user leaves; whether every turn was answered.

    settings: words like `temperature=0.7`. Raises LuthierError for what cannot be opened; in a turn it is shown, and
    the conversation goes on.
    """
    quiet_libraries()
    said = read_settings(settings)
    terminal = Terminal(list(COMMANDS))
    answerer = open_model(
        target,
        adapters=adapters,
        base=base,
        template=template,
        device=device,
        engine=engine,
        say=terminal.note,
    )
    session = Session(answerer, system=system, settings=said)
    if terminal.interactive:
        terminal.note(
            f"{answerer.label}: {settings_line(session)}\n/help lists the commands; Ctrl-D leaves\n"
        )
    return _turns(session, terminal)


def _turns(session: Session, terminal: Terminal) -> bool:
    every = True
    while (text := terminal.read()) is not None:
        if not text.strip():
            continue
        try:
            if _turn(session, terminal, text):
                break
        except LuthierError as error:
            terminal.error(str(error))
            every = False
        except KeyboardInterrupt:
            if not terminal.interactive:
                raise
            terminal.note("\n(stopped)")
    return every


def _turn(session: Session, terminal: Terminal, text: str) -> bool:
    """Do or answer what was said; whether that was the end."""
    if text.startswith("/") and not text.startswith("//"):
        outcome = run_command(session, text)
        terminal.note(outcome.note)
        answer = outcome.answer
    else:
        outcome = None
        answer = session.ask(text.removeprefix("/") if text.startswith("//") else text)
    if answer is not None:
        ended = terminal.show(answer)
        terminal.note(_ending(session, ended))
    return outcome is not None and outcome.leaves


def _ending(session: Session, ended: bool) -> str:
    """Why an answer is not whole, and what to do; nothing where it is."""
    end = session.last
    if not ended or end is None:
        return "(stopped)"
    if end.finish == "error":
        return "(the model's scores are no numbers any more: the answer ends here)"
    if end.finish != "length":
        return ""
    longest = session.answerer.settings(**session.settings).max_new_tokens
    if len(end.choices) < longest:
        return "(the context is full: /undo takes the last turn back, /clear begins anew)"
    return f"(cut at max_new_tokens={longest}; /set max_new_tokens {2 * longest} for longer answers)"
