"""What becomes of the reasoning in answers."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from luthier.recipe.base import Spec


class ThinkingSpec(Spec):
    """Reasoning in answers: what later turns see of it, what is learnt of it, and answers that have none.

    All of it but `answers: last` becomes part of the chat template that is saved with the model.
    """

    history: Literal["template", "keep", "strip"] = "template"
    """Reasoning of earlier turns (before the last question): as the template shows it, always kept, or taken out. Where
    `empty` is given, keep keeps empty thoughts too."""
    answers: Literal["all", "last", "none"] = "all"
    """Answers that are learnt with their reasoning: all; those of the last turn (earlier reasoning is context at
    most); none, then all reasoning is taken out."""
    empty: Literal["template", "learn", "prompt"] = "template"
    """An answer without reasoning: as the template shows it; with an empty thought that is learnt; or with an empty
    thought that belongs to the prompt, as the template's non-thinking mode has it."""
    enable: bool | None = None
    """What `enable_thinking` is where a request does not say; absent: the template's own rule."""

    @model_validator(mode="after")
    def _one_mode(self) -> ThinkingSpec:
        if self.enable is False and self.empty == "learn":
            raise ValueError(
                "enable: false has the empty thought in the prompt and empty: learn has it in the answer; "
                "write empty: prompt, or leave enable out"
            )
        return self

    @property
    def in_template(self) -> bool:
        """Whether anything of it becomes part of the chat template."""
        return (
            self.history != "template"
            or self.answers == "none"
            or self.empty != "template"
            or self.enable is not None
        )
