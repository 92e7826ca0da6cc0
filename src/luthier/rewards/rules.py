"""Rewards that need nothing but the row and the answer: exact match, number, format, length."""

from __future__ import annotations

import re

from luthier.experience import Completion, Prompt
from luthier.recipe.online import ExactMatchSpec, LengthSpec, NumericSpec, RegexSpec
from luthier.rewards.base import EachAlone, gold
from luthier.rewards.numerals import Number, last_number


class ExactMatch(EachAlone):
    """1 where the answer is the row's, spaces at the ends aside; else 0."""

    def __init__(self, spec: ExactMatchSpec, name: str) -> None:
        super().__init__(name)
        self.spec = spec

    def require(self, prompt: Prompt) -> None:
        gold(self, prompt, self.spec.column)

    def score(self, completion: Completion) -> float:
        said, wanted = completion.text.strip(), gold(self, completion.prompt, self.spec.column).strip()
        if self.spec.ignore_case:
            said, wanted = said.casefold(), wanted.casefold()
        return float(said == wanted)


class Numeric(EachAlone):
    """1 where the last number of the answer is the last number of the row's; else 0, without a number too."""

    def __init__(self, spec: NumericSpec, name: str) -> None:
        super().__init__(name)
        self.spec = spec

    def require(self, prompt: Prompt) -> None:
        self._wanted(prompt)

    def score(self, completion: Completion) -> float:
        wanted, said = self._wanted(completion.prompt), last_number(completion.text)
        return float(said is not None and said.equals(wanted, self.spec.tolerance))

    def _wanted(self, prompt: Prompt) -> Number:
        text = gold(self, prompt, self.spec.column)
        number = last_number(text)
        if number is None:
            raise self.fault(prompt, f"the row's answer has no number: {text[:100]!r}")
        return number


class Pattern(EachAlone):
    """1 where the answer matches a regular expression, in which a dot matches the end of a line too; else 0."""

    def __init__(self, spec: RegexSpec, name: str) -> None:
        super().__init__(name)
        self._pattern = re.compile(spec.pattern, re.DOTALL)
        self._whole = spec.whole

    def score(self, completion: Completion) -> float:
        match = self._pattern.fullmatch if self._whole else self._pattern.search
        return float(match(completion.text) is not None)


class Length(EachAlone):
    """0 where the answer has `least` to `most` tokens, the stop token among them; outside less by 1 / `slack` for each
    token, and never below -1."""

    def __init__(self, spec: LengthSpec, name: str) -> None:
        super().__init__(name)
        self.spec = spec

    def score(self, completion: Completion) -> float:
        spec, length = self.spec, len(completion)
        over = 0 if spec.most is None else length - spec.most
        outside = max(spec.least - length, over, 0)
        return -min(1.0, outside / spec.slack)
