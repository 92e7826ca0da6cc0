"""The examples of docs/serve.md, run as they stand against the model that they speak of."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from pathlib import Path

import pytest
import torch

from luthier.api.server import load
from tests.reward import reward_recipe
from tests.serving import running
from tests.tiny import chat_model

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000/v1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def curl(command: str, url: str) -> str:
    """The output of a curl command of the page, sent to another port."""
    assert ADDRESS in command
    words = command.replace(ADDRESS, url).replace("curl ", "curl -sS --fail-with-body ", 1)
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_examples_of_a_chat(tmp_path: Path) -> None:
    model = load(chat_model(tmp_path / "model", initializer_range=0.2), {}, name="quickstart")
    with running(model) as server:
        (command,) = [block for block in blocks("bash") if "/chat/completions" in block]
        assert '"object":"chat.completion"' in curl(command, server.url)
        (program,) = blocks("python")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program.replace(ADDRESS, server.url), {})
    text = printed.getvalue()
    plain, streamed = text[: len(text) // 2], text[len(text) // 2 + 1 :]
    assert len(plain) > 4 and plain == streamed  # greedy, once whole and once in pieces


def test_the_example_of_a_score(tmp_path: Path) -> None:
    import luthier

    run = luthier.train(reward_recipe(tmp_path, {"type": "lora", "rank": 2}, max_steps=1), quiet=True).output
    (block,) = [block for block in blocks("bash") if "/v1/score" in block]
    with running(load(run, {}, name="reward")) as server:
        assert '"object":"score"' in curl(block[block.index("curl") :], server.url)
