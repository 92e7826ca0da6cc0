"""`luthier chat` through pipes and in a terminal, with a tiny model that has learnt a few answers by heart."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import luthier
from luthier.answering import Answerer, open_model
from luthier.chat.session import Piece, Session
from luthier.chat.terminal import Terminal
from luthier.cli import app
from luthier.run import prepare
from luthier.types import DataError, Event, GenerationError, Request
from tests.reward import reward_recipe
from tests.tiny import chat_model

TEMPLATE = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LEARNT = [
    [("user", "Hi"), ("assistant", "Hello.")],
    [("user", "Hi"), ("assistant", "Hello."), ("user", "Why"), ("assistant", "So.")],
    [("system", "Loud"), ("user", "Hi"), ("assistant", "HEY")],
    [("user", "Think"), ("assistant", "Done.", "hm hm")],
    [("user", "a\nb"), ("assistant", "Two.")],
]
CONTEXT = 96


def turn(role: str, content: str, reasoning: str | None = None) -> dict[str, str]:
    return {"role": role, "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "template.jinja").write_text(TEMPLATE)
    rows = [{"messages": [turn(*one) for one in row]} for row in LEARNT]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": CONTEXT}
    recipe = {
        "model": {"path": str(chat_model(folder / "base", **shape))},
        "data": {
            "train": [{"file_name": "rows.jsonl", "formatting": "openai"}],
            "directory": str(folder),
            "cache": str(folder / "cache"),
            "template": str(folder / "template.jinja"),
            "max_length": CONTEXT,
        },
        "method": {"type": "full"},
        "optim": {"lr": 0.01},
        "train": {
            "rows_per_device": 5,
            "max_steps": 120,
            "plots": False,
            "save_every": None,
            "output": str(folder / "run"),
        },
    }
    return luthier.train(recipe, quiet=True).output


@pytest.fixture(scope="module")
def answerer(run: Path) -> Answerer:
    return open_model(run)


@pytest.fixture
def opened(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> Answerer:
    """The model that every chat of a test opens, loaded once."""
    monkeypatch.setattr("luthier.chat.verb.open_model", lambda *_, **__: answerer)
    return answerer


def chat(*lines: str, words: tuple[str, ...] = ()) -> Any:
    """Say these lines through pipes."""
    return CliRunner().invoke(app, ["chat", "RUN", *words], input="".join(f"{line}\n" for line in lines))


def test_a_line_is_a_turn_and_the_answers_are_on_stdout(opened: Answerer) -> None:
    done = chat("Hi", "Why")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "Hello.\nSo.\n", "")
    # The second answer depends on the first turn: without it another one is given.
    assert chat("Why").stdout != "So.\n"
    assert chat("Hi", "", "Why").stdout == "Hello.\nSo.\n"


def test_reasoning_stands_apart(opened: Answerer) -> None:
    done = chat("Think")
    assert (done.stdout, done.stderr.strip()) == ("Done.\n", "hm hm")
    session = Session(opened)
    assert [(piece.reasoning, piece.text) for piece in session.ask("Think")]
    message = session.messages[-1]
    assert (message.reasoning, message.content) == ("hm hm", "Done.")
    # Earlier reasoning is not shown again, as in training.
    session.messages.append(message.__class__("user", "Why"))
    assert "hm hm" not in opened.template.decode(session.request().prompt)


def test_several_lines_are_one_turn(opened: Answerer) -> None:
    assert chat("a\\", "b").stdout == "Two.\n"
    assert chat('"""', "a", "b", '"""').stdout == "Two.\n"
    assert chat('"""a', 'b"""').stdout == "Two.\n"


def test_system_clear_and_undo(opened: Answerer) -> None:
    done = chat("/system Loud", "Hi", "/clear", "Hi", "/system none", "/clear", "Hi", "Why", "/undo", "Why")
    assert done.stdout == "HEY\nHEY\nHello.\nSo.\nSo.\n"
    assert "system message set" in done.stderr and "taken back: Why" in done.stderr
    assert chat("Hi", words=("--system", "Loud")).stdout == "HEY\n"
    assert "system message: Loud" in chat("/system", words=("--system", "Loud")).stderr
    done = chat("/undo")
    assert done.exit_code == 2 and "error: nothing was asked yet" in done.stderr


def test_retry_answers_the_same_question(opened: Answerer) -> None:
    done = chat("Hi", "/retry", "Why")
    assert done.stdout == "Hello.\nHello.\nSo.\n"
    assert "the same settings draw the same answer; /set temperature 0.7" in done.stderr
    session = Session(opened, settings={"temperature": 4.0, "max_new_tokens": 8})
    texts = set()
    for piece in session.ask("Hi"):
        assert piece.text
    for _ in range(6):
        list(session.retry())
        texts.add(session.messages[-1].content)
        assert len(session.messages) == 2
    assert len(texts) > 1


def test_settings(opened: Answerer) -> None:
    done = chat("Hi", "/set", words=("max_new_tokens=3", "generation.top_k=2"))
    assert done.stdout == "Hel\n"
    assert "(cut at max_new_tokens=3; /set max_new_tokens 6 for longer answers)" in done.stderr
    assert "greedy (temperature 0), max_new_tokens 3" in done.stderr
    done = chat(
        "/set max_new_tokens 2", "Hi", "/set max_new_tokens=null", "/clear", "Hi", "/set temperature 0.7"
    )
    assert done.stdout == "He\nHello.\n"
    assert "temperature 0.7, top_p 1, top_k 0, max_new_tokens 512" in done.stderr
    assert chat("Hi", words=("stop=l",)).stdout == "He\n"
    # The same seed draws the same, another one does not.
    words = ("temperature=3.0", "max_new_tokens=12")
    drawn = [chat("Hi", words=(*words, f"seed={seed}")).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "unknown key; did you mean temperature?"),
        ("/set temperature -1", "temperature"),
        ("/set temperature hot", "expected a number"),
        ("/set temperature", "write /set NAME VALUE, with a NAME of do_sample"),
        ("/set rows 4", "about many answers at once"),
        ("/sett temperature 1", "there is no command /sett; did you mean /set?"),
        ("/what", "there is no command /what; /help lists them all"),
        ("/adapter x", "this model was loaded without others; start with --adapter NAME=FOLDER"),
        ("/save", "Write /save FILE"),
        ("/save x.jsonl", "there is no answer yet"),
        ("/retry", "nothing was asked yet"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(opened: Answerer, line: str, message: str) -> None:
    done = chat(line, "Hi")
    assert (done.exit_code, done.stdout) == (2, "Hello.\n")
    assert message in done.stderr and "Traceback" not in done.output


def test_help_and_exit(opened: Answerer) -> None:
    done = chat("/help", "/exit", "Hi")
    assert (done.exit_code, done.stdout) == (0, "")
    for command in ("/clear", "/system TEXT", "/save FILE", "/retry", "/undo", "/adapter NAME", "/set NAME"):
        assert command in done.stderr
    # Two slashes say one to the model.
    session = Session(opened)
    list(session.ask("/Hi"))
    assert chat("//Hi").stdout == session.messages[-1].content + "\n"


def test_a_conversation_that_outgrows_the_context_is_refused(opened: Answerer) -> None:
    done = chat("x" * CONTEXT, "Hi")
    assert (done.exit_code, done.stdout) == (2, "Hello.\n"), "the long turn is not kept"
    assert f"tokens, and {CONTEXT} is all that question and answer may have together: /undo" in done.stderr
    session = Session(opened)
    with pytest.raises(GenerationError, match="/clear begins anew"):
        for _ in range(CONTEXT):
            list(session.ask("Hi"))
    length = len(session.messages)
    assert length >= 4 and session.messages[-1].role == "assistant"
    session.undo()
    assert len(session.messages) == length - 2
    with pytest.raises(GenerationError, match="8 is all that"):
        list(Session(opened, settings={"max_length": 8}).ask("Hi"))
    done = chat("Hi", "y" * 40)
    assert "cut" not in done.stderr
    done = chat("z" * 60, words=("temperature=5.0", "seed=3", "repetition_penalty=1.5"))
    assert "(the context is full: /undo takes the last turn back, /clear begins anew)" in done.stderr


def test_a_saved_conversation_is_training_data(run: Path, opened: Answerer, tmp_path: Path) -> None:
    file = tmp_path / "new" / "talk.jsonl"
    done = chat("/system Loud", "Hi", "Think", f"/save {file}", "Hi", f"/save {file}")
    assert done.exit_code == 0 and f"saved: {file}" in done.stderr
    assert [path.name for path in file.parent.iterdir()] == ["talk.jsonl"]
    session = Session(opened, system="Loud")
    for text in ("Hi", "Think", "Hi"):
        list(session.ask(text))
    data = {
        "train": [{"file_name": "talk.jsonl", "formatting": "openai"}],
        "directory": str(file.parent),
        "cache": str(tmp_path / "c"),
        "template": str(run.parent / "template.jinja"),
        "mask_history": True,
    }
    recipe = {
        "model": {"path": str(run.parent / "base")},
        "data": data,
        "train": {"output": str(tmp_path / "o")},
    }
    [sample] = prepare(recipe, quiet=True).train
    answer = session.messages.pop()
    ids = sample.input_ids.tolist()
    prompt = list(session.request().prompt)
    assert ids[: len(prompt)] == prompt
    assert opened.template.decode(ids[len(prompt) :]) == f"{answer.content}<|im_end|>\n"
    done = chat("Hi", f"/save {file}")
    assert done.exit_code == 2 and "exists already; choose another name" in done.stderr
    done = chat("Hi", f"/save {file}/x")
    assert done.exit_code == 2 and "cannot be written" in done.stderr


def test_stopping_an_answer_keeps_what_was_said(opened: Answerer) -> None:
    session = Session(opened, settings={"temperature": 9.0, "seed": 1})
    answer = session.ask("Hi")
    first = next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert session.messages[-1].role == "assistant" and session.messages[-1].content.startswith(first.text)
    assert session.last is None and not opened.engine.busy
    # The engine is as before.
    session.clear()
    session.change({"temperature": 0.0})
    list(session.ask("Hi"))
    assert session.messages[-1].content == "Hello."


def test_ctrl_c_stops_the_answer_and_not_the_program(
    opened: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = opened.engine.stream
    before = signal.getsignal(signal.SIGINT)

    def interrupted(request: Request) -> Iterator[Event]:
        for number, event in enumerate(stream(request)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield event

    monkeypatch.setattr(opened.engine, "stream", interrupted)
    done = chat("Hi", "/undo", "/retry", "Hi")
    assert done.stdout == "Hel\nHel\n" and done.stderr.count("(stopped)") == 2
    assert "taken back: Hi" in done.stderr
    assert signal.getsignal(signal.SIGINT) is before and not opened.engine.busy


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    terminal = Terminal()
    terminal.interactive = True
    assert terminal.show(iter([Piece("a\x1b]0;title\x07b\tc\nd\x9b")]))
    assert capsys.readouterr().out == "a\ufffd]0;title\ufffdb\tc\nd\ufffd\n"


def test_adapters_are_switched_in_the_middle(run: Path, tmp_path: Path) -> None:
    """Of a bare base: two adapters, one of which has learnt to say HEY, and the base itself."""
    folder = tmp_path
    adapters = []
    for name, row in (("quiet", LEARNT[0]), ("loud", [("user", "Hi"), ("assistant", "HEY")])):
        (folder / f"{name}.jsonl").write_text(json.dumps({"messages": [turn(*one) for one in row]}) + "\n")
        recipe = {
            "model": {"path": str(run.parent / "base")},
            "data": {
                "train": [{"file_name": f"{name}.jsonl", "formatting": "openai"}],
                "directory": str(folder),
                "cache": str(folder / "c"),
            },
            "method": {"type": "lora", "rank": 8, "modules_to_save": ["lm_head"]},
            "optim": {"lr": 0.02},
            "train": {"max_steps": 60, "plots": False, "save_every": None, "output": str(folder / name)},
        }
        adapters.append(f"{name}={luthier.train(recipe, quiet=True).output}")
    base = str(run.parent / "base")
    lines = [
        "Hi",
        "/clear",
        "/adapter loud",
        "Hi",
        "/clear",
        "/adapter",
        "/adapter base",
        "Hi",
        "/adapter soft",
    ]
    options = [word for adapter in adapters for word in ("--adapter", adapter)]
    words = ["chat", base, *options, "max_new_tokens=8"]
    done = CliRunner().invoke(app, words, input="\n".join(lines))
    said = done.stdout.splitlines()
    assert len(set(said)) == 3 and said[1] == "HEY"
    for answer, target in zip(said, ("quiet", "loud", base), strict=True):
        alone = CliRunner().invoke(app, ["chat", str(folder / target), "max_new_tokens=8"], input="Hi\n")
        assert (alone.exit_code, alone.stdout) == (0, answer + "\n")
    assert "adapters: quiet, loud (now), base" in done.stderr
    assert "there is no adapter 'soft'; choose from quiet, loud, base" in done.stderr
    assert done.exit_code == 2
    luthier.export(folder / "loud", output=folder / "merged", quiet=True)
    assert CliRunner().invoke(app, ["chat", str(folder / "merged")], input="Hi\n").stdout == "HEY\n"
    for wrong in ("loud", "loud=", "=x"):
        done = CliRunner().invoke(app, ["chat", base, "--adapter", wrong], input="")
        assert done.exit_code == 2 and "error:" in done.stderr


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["chat", str(tmp_path / "nothing")], input="Hi\n")
    assert done.exit_code == 2 and "no such folder" in done.stderr
    done = CliRunner().invoke(app, ["chat", "embedded", "temprature=1"], input="Hi\n")
    assert done.exit_code == 2 and "did you mean temperature?" in done.stderr
    reward = luthier.train(reward_recipe(tmp_path, {"type": "lora", "rank": 2}), quiet=True).output
    done = CliRunner().invoke(app, ["chat", str(reward)], input="Hi\n")
    assert done.exit_code == 2 and "is a reward model" in done.stderr and "luthier score" in done.stderr


def test_a_new_session_checks_its_settings(opened: Answerer) -> None:
    with pytest.raises(GenerationError, match="top_p"):
        Session(opened, settings={"top_p": 0.0})
    with pytest.raises(DataError, match="no answer yet"):
        Session(opened).save("x")


# --------------------------------------------------------------------------------------------------
# The program itself


def program(*words: str) -> list[str]:
    return [sys.executable, "-m", "luthier.cli", "chat", *words]


def test_bytes_that_are_no_text_are_a_turn_too(run: Path) -> None:
    done = subprocess.run(
        program(str(run), "max_new_tokens=4"),
        input=b"\xff\xfe\n/clear\nHi\n",
        capture_output=True,
        env=environment() | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert done.stdout.endswith(b"\nHell\n") and b"Traceback" not in done.stderr


def environment() -> dict[str, str]:
    source = str(Path(luthier.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}


def test_through_real_pipes(run: Path) -> None:
    done = subprocess.run(
        program(str(run)), input="Hi\nWhy", capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout == "Hello.\nSo.\n"


class Screen:
    """A program in a terminal of its own: what it wrote, and keys for it."""

    def __init__(self, words: list[str]) -> None:
        self.pid, self.file = pty.fork()
        if not self.pid:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # a shell's background jobs ignore it, and their children
            os.execvpe(words[0], words, environment())
        self.text = ""

    def until(self, expected: str, seconds: float = 120) -> str:
        """Read until this was written; everything up to there."""
        end = time.monotonic() + seconds
        while expected not in self.text:
            assert time.monotonic() < end, f"{expected!r} never came: {self.text!r}"
            if select.select([self.file], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.file, 4096).decode(errors="replace")
                except OSError:  # it ended
                    raise AssertionError(f"{expected!r} never came: {self.text!r}") from None
        before, _, self.text = self.text.partition(expected)
        return before + expected

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def interrupt(self, expected: str) -> None:
        """Ctrl-C until this was written: one that comes while the line editor sets itself up is heard at the next key."""
        for _ in range(10):
            self.type("\x03")
            try:
                self.until(expected, seconds=5)
            except AssertionError:
                continue
            return
        raise AssertionError(f"{expected!r} never came: {self.text!r}")

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def screen(run: Path) -> Iterator[Screen]:
    shown = Screen(program(str(run), "temperature=0"))
    yield shown
    os.close(shown.file)


def test_in_a_terminal(screen: Screen) -> None:
    """Prompts, dim reasoning, an answer that Ctrl-C stops, a line that it forgets, and Ctrl-D."""
    screen.until("/help lists the commands; Ctrl-D leaves")
    screen.until("> ")
    screen.type("Think\n")
    assert screen.until("Done.").count("\x1b[2m") == len("hm hm"), "each letter is a token, and dim"
    screen.until("> ")
    screen.type("/set temperature 9\n")
    screen.until("temperature 9")
    screen.until("> ")
    screen.type('/set stop ["never"]\n')
    screen.until("> ")
    screen.type("half a li")
    screen.until("half a li")
    screen.interrupt("leaves)")
    screen.until("> ")
    screen.type("/clear\n")
    screen.until("begins anew")
    screen.until("> ")
    screen.type("Hi\n")
    screen.until("Hi")
    os.kill(screen.pid, signal.SIGINT)
    screen.until("> ")
    screen.type("/set temperature 0\n")
    screen.until("greedy")
    screen.until("> ")
    screen.type("/clear\nHi\n")
    screen.until("Hello.")
    screen.until("> ")
    screen.type("\x04")
    assert screen.end() == 0
