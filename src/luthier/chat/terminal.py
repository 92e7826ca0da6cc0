"""Where a chat is read from and shown: a terminal, or pipes.

In a terminal, prompts, notes and the dim reasoning stand among the answers. Through pipes, stdout has the answers
alone, and everything else goes to stderr.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType
from typing import Any

from rich.console import Console

from luthier.chat.session import Piece

_PROMPT, _MORE, _BLOCK = "> ", ". ", '"""'
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What could move the cursor, or write into a terminal's settings."""


class Terminal:
    """Reads turns and shows answers."""

    def __init__(self, commands: Sequence[str] = ()) -> None:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # what the encoding of the locale lacks is no reason to end
                stream.reconfigure(errors="replace")
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._out = Console(soft_wrap=True, highlight=False)
        self._notes = self._out if self.interactive else Console(stderr=True, soft_wrap=True, highlight=False)
        if self.interactive:
            _edit_lines(commands)

    def read(self) -> str | None:
        """The next turn; None at the end. Several lines are one turn where a line ends with a backslash, or stands
        between lines of three quotes. Ctrl-C forgets what was typed."""
        while True:
            try:
                return self._turn()
            except EOFError:
                if self.interactive:
                    self._out.print()
                return None
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.note("\n(/exit or Ctrl-D leaves)")

    def _turn(self) -> str:
        line = self._line(_PROMPT)
        if line.strip().startswith(_BLOCK):
            lines = [line.strip().removeprefix(_BLOCK)]
            while not lines[-1].rstrip().endswith(_BLOCK):
                lines.append(self._line(_MORE))
            lines[-1] = lines[-1].rstrip().removesuffix(_BLOCK)
            return "\n".join(lines).strip("\n")
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._line(_MORE))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.interactive:
            return input(prompt)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")

    def show(self, answer: Iterator[Piece]) -> bool:
        """Write an answer as it comes; whether it came to its end: Ctrl-C stops it."""
        thinking = False
        with _stoppable() as stopped:
            try:
                for piece in answer:
                    if thinking and not piece.reasoning:
                        self._notes.print()
                        self._notes.print()
                    thinking = piece.reasoning
                    self._write(piece)
                    if stopped.is_set():
                        break
            finally:
                close = getattr(answer, "close", None)
                if close is not None:
                    close()
        if thinking and not self.interactive:
            self._notes.print()
        self._out.print()
        return not stopped.is_set()

    def _write(self, piece: Piece) -> None:
        console = self._notes if piece.reasoning else self._out
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", piece.text) if self.interactive else piece.text
        if piece.reasoning and self.interactive:
            console.out(text, end="", style="dim", highlight=False)
        else:  # as it is: rich would put spaces in the place of tabs
            console.file.write(text)
        console.file.flush()

    def note(self, text: str) -> None:
        """Say something that is no part of an answer."""
        if text:
            self._notes.print(text, style="dim" if self.interactive else None, markup=False)

    def error(self, text: str) -> None:
        """Say what could not be done."""
        self._notes.print(f"error: {text}", style="red" if self.interactive else None, markup=False)


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C inside, so that an answer ends between two tokens; a second one interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before: Any = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _edit_lines(commands: Sequence[str]) -> None:
    """Arrow keys, a history of this session, and commands completed with the tab key, where the platform has them."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        found = [f"/{name} " for name in commands if f"/{name}".startswith(text)] if text else []
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")
