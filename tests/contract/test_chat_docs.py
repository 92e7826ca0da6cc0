"""The page on chat knows every command and every setting, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from luthier.chat.commands import COMMANDS
from luthier.recipe.settings import SETTINGS
from tests.contract.test_docs import documented

PAGE = Path(__file__).parents[2] / "docs" / "chat.md"


def test_the_page_has_every_command_and_no_other() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"`/([a-z]+)[^`]*`", text)) == set(COMMANDS)
    for command in COMMANDS.values():
        assert f"`{command.usage}`" in text


def test_the_page_has_every_setting_and_no_other() -> None:
    text = PAGE.read_text(encoding="utf-8")
    said = text.partition("`generation` section:")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", said)) == set(SETTINGS)


def test_the_pages_commands_are_among_those_that_are_parsed() -> None:
    lines = [line for page, line in documented() if page == "docs/chat.md"]
    assert len([line for line in lines if line.startswith("luthier chat ")]) >= 6
