"""Rewards that need no model: what each says of an answer, and that nothing that goes wrong becomes a number."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from luthier.experience import Completion, RewardError
from luthier.recipe.online import (
    ExactMatchSpec,
    FunctionRewardSpec,
    LengthSpec,
    MathVerifySpec,
    NumericSpec,
    ReasoningGymSpec,
    RegexSpec,
    RewardSpec,
)
from luthier.rewards import REWARDS, Rewards, build_rewards
from luthier.rewards.numerals import last_boxed, last_number
from luthier.types import RecipeError
from tests.completions import answers, completion, prompt


def built(*specs: Any, beside: Path | None = None) -> Rewards:
    return build_rewards(specs, decode=lambda ids: "", beside=beside)


def scores(spec: Any, texts: list[str], label: str | None = None, **row: Any) -> list[float]:
    found = built(spec)(answers(texts, label, row))
    assert found.dtype == np.float32 and found.shape == (len(texts), 1)
    return [float(value) for value in found[:, 0]]


def test_every_type_of_the_schema_has_a_builder() -> None:
    union = get_args(get_args(RewardSpec)[0])
    assert {kind.model_fields["type"].default for kind in union} == set(REWARDS)


# --------------------------------------------------------------------------------------------------
# Several at once


def test_several_are_apart_and_in_sum() -> None:
    rewards = built(
        ExactMatchSpec(weight=2.0), LengthSpec(most=3, slack=4, weight=-0.5), ExactMatchSpec(ignore_case=True)
    )
    assert rewards.names == ("exact_match", "length", "exact_match_2")
    np.testing.assert_array_equal(rewards.weights, np.float32([2.0, -0.5, 1.0]))
    # "Yes" and a stop token are 4 tokens, 1 of 4 too many; "no!!!" is 6, 3 too many.
    found = rewards([*answers(["Yes", "yes", "no!!!"], "Yes")])
    np.testing.assert_array_equal(found, np.float32([[1, -0.25, 1], [0, -0.25, 1], [0, -0.75, 0]]))
    np.testing.assert_array_equal(rewards.totals(found), np.float32([3.125, 1.125, 0.375]))
    assert rewards([]).shape == (0, 3)


def test_names_are_told_apart() -> None:
    rewards = built(
        ExactMatchSpec(), ExactMatchSpec(name="exact_match_2"), ExactMatchSpec(), RegexSpec(pattern="a")
    )
    assert rewards.names == ("exact_match", "exact_match_2", "exact_match_3", "regex")


# --------------------------------------------------------------------------------------------------
# Rules


def test_exact_match() -> None:
    assert scores(ExactMatchSpec(), ["Paris", " Paris\n", "paris", "Paris.", ""], "Paris ") == [1, 1, 0, 0, 0]
    assert scores(ExactMatchSpec(ignore_case=True), ["PARIS", "STRASSE"], "paris") == [1, 0]
    assert scores(ExactMatchSpec(ignore_case=True), ["STRASSE"], "Straße") == [1]
    assert scores(ExactMatchSpec(column="gold"), ["7", "seven"], "seven", gold=7) == [1, 0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 42.", "42"),
        ("so it is...42", "42"),
        ("答案是42。", "42"),
        ("3 apples and 4 pears: 7", "7"),
        ("x=-5", "-5"),
        ("(\u22125)", "-5"),
        ("10-5", "5"),
        ("COVID-19", "19"),
        ("-$5", "-5"),
        ("$-5$", "-5"),
        (r"\$1,200", "1200"),
        ("1,234,567.5", "1234567.5"),
        ("$1{,}234$", "1234"),
        (r"12\,345", "12345"),
        ("1,2,3", "3"),
        (".5", "0.5"),
        ("0.125", "0.125"),
        ("1.5e-3", "0.0015"),
        ("3/4", "3/4"),
        ("-7 / 8", "-7/8"),
        ("3 1/2 cups", "7/2"),
        ("step 8 9/2", "9/2"),
        ("12/25/2024", "2024"),
        (r"-\frac{3}{4}", "-3/4"),
        (r"\dfrac12", "1/2"),
        (r"\frac{-1{,}000}{3}", "-1000/3"),
        (r"so \boxed{\frac{1}{2}}, from 7", "1/2"),
        (r"\boxed{1} then \boxed{ {2} }", "2"),
        (r"\boxed{7", "7"),
        ("#### 1,000", "1000"),
        ("5th", "5"),
    ],
)
def test_the_last_number(text: str, value: str) -> None:
    number = last_number(text)
    assert number is not None and number.value == Fraction(value) and not number.percent


@pytest.mark.parametrize("text", ["", "none", "x2", "1/0", r"\boxed{x} 5", "9" * 1001])
def test_no_number(text: str) -> None:
    assert last_number(text) is None


def test_a_huge_exponent_is_none() -> None:
    """What a policy writes must not cost memory: 1e999999999 is not expanded."""
    number = last_number("1e999999999")
    assert number is not None and number.value == 1


def test_boxed() -> None:
    assert last_boxed(r"\boxed{a} \boxed{\frac{b}{c}}") == r"\frac{b}{c}"
    assert last_boxed(r"\boxed{a") is None and last_boxed("a") is None


def test_numeric() -> None:
    assert scores(NumericSpec(), ["7", "it is 7.0", "7.5", "none", ""], "2 + 5 = 7\n#### 7") == [
        1,
        1,
        0,
        0,
        0,
    ]
    assert scores(NumericSpec(), ["0.3333", "1/3", "2/6"], "1/3") == [0, 1, 1]
    assert scores(NumericSpec(tolerance=0.001), ["0.3333", "0.33", "0.334"], "1/3") == [1, 0, 1]
    assert scores(NumericSpec(), ["50%", "50 %", "0.5", "50", "5"], "50%") == [1, 1, 1, 1, 0]
    assert scores(NumericSpec(), ["20%", "0.2"], "20") == [1, 0]
    assert scores(NumericSpec(column="gold"), ["-1", "1"], gold=-1) == [1, 0]


def test_regex() -> None:
    whole = RegexSpec(pattern=r"<think>.*</think>\s*\d+")
    assert scores(whole, ["<think>a\nb</think>\n7", "say <think></think>7", "7"]) == [1, 0, 0]
    assert scores(RegexSpec(pattern=r"\d", whole=False), ["a7b", "ab"]) == [1, 0]


def test_length() -> None:
    rewards = built(LengthSpec(least=4, most=6, slack=4))
    found = rewards([completion("x", length=n) for n in (1, 3, 4, 6, 7, 10, 50)])
    np.testing.assert_array_equal(found[:, 0], np.float32([-0.75, -0.25, 0, 0, -0.25, -1, -1]))


@pytest.mark.parametrize(
    ("spec", "label", "row", "words"),
    [
        (
            ExactMatchSpec(),
            None,
            {},
            "reward exact_match: sums, row 1: the row has no answer to compare with",
        ),
        (
            ExactMatchSpec(column="gold"),
            "7",
            {"other": 1},
            "nothing in its column 'gold'; its columns are: other",
        ),
        (NumericSpec(column="gold"), "7", {"gold": None}, "nothing in its column 'gold'"),
        (
            NumericSpec(name="sum"),
            "seven",
            {},
            "reward sum: sums, row 1: the row's answer has no number: 'seven'",
        ),
    ],
)
def test_a_row_without_its_answer_is_named_before_the_run(
    spec: Any, label: str | None, row: dict[str, Any], words: str
) -> None:
    rewards = built(spec)
    good = prompt(index=0, label="7", gold=7)
    rewards.require([good])
    bad = prompt(index=1, label=label, **row)
    with pytest.raises(RewardError, match=re.escape(words)):
        rewards.require([good, bad])
    with pytest.raises(RewardError, match=re.escape(words)):
        rewards([completion("7", good), completion("7", bad)])


# --------------------------------------------------------------------------------------------------
# Functions

FUNCTIONS = """
import numpy as np

def reward(prompt, completion, row):
    return len(completion) + 100 * len(prompt) + row["bonus"]

def with_more(prompt, completion, row, scale=2):
    return scale

def of_all(completions):
    return [len(c) + (0.5 if c.truncated else 0) for c in completions]

def nothing(prompt, completion, row): return None
def text(prompt, completion, row): return "1.0"
def nan(prompt, completion, row): return float("nan") if "b" in completion else 1.0
def inf(prompt, completion, row): return np.float32("inf")
def huge(prompt, completion, row): return 10 ** 400
def beyond(prompt, completion, row): return 1e39
def half(prompt, completion, row): return np.float16(0.5)
def yes(prompt, completion, row): return "a" in completion
def raises(prompt, completion, row): return row["absent"]
def spoils(prompt, completion, row): return row.pop("bonus")
def too_few(completions): return [1.0] * (len(completions) - 1)
def one(completions): return 1.0
def fails(completions): raise ValueError("no")
def two(prompt, completion): return 1.0
class Reward: pass
value = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(FUNCTIONS)
    return tmp_path


def named(folder: Path, name: str) -> Rewards:
    return built(FunctionRewardSpec(path=f"own.py:{name}"), beside=folder)


def test_a_function_is_given_prompt_completion_and_row(folder: Path) -> None:
    asked = [prompt("a" * n, n, bonus=0.25) for n in (1, 2)]
    found = named(folder, "reward")([completion("xyz", asked[0]), completion("", asked[1])])
    np.testing.assert_array_equal(found[:, 0], np.float32([103.25, 200.25]))
    assert named(folder, "with_more")(answers(["a"]))[0, 0] == 2
    np.testing.assert_array_equal(named(folder, "of_all")(answers(["a", "abc"]))[:, 0], [2, 4])
    assert named(folder, "of_all")([]).shape == (0, 1)
    assert named(folder, "half")(answers(["a"]))[0, 0] == 0.5
    np.testing.assert_array_equal(named(folder, "yes")(answers(["a", "b"]))[:, 0], [1, 0])


def test_a_function_cannot_change_the_row(folder: Path) -> None:
    asked = prompt(bonus=1.5)
    assert named(folder, "spoils")([completion("a", asked), completion("b", asked)]).tolist() == [
        [1.5],
        [1.5],
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "reward function: sums, row 0: it returned None, where a number is expected"),
        ("text", "row 0: it returned a value (str)"),
        ("nan", "reward function: sums, row 1: it returned nan, which is no finite float32"),
        ("inf", "row 0: it returned"),
        ("huge", "which is no finite float32"),
        ("beyond", "it returned 1e+39, which is no finite float32"),
        ("raises", "reward function: sums, row 0: own.py:raises failed: KeyError: 'absent'"),
        ("too_few", "reward function: sums, row 0: it gave 1 numbers for 2 answers"),
        ("one", "own.py:one returned a value (float) for 2 answers, not a list"),
        ("fails", "own.py:fails failed on 2 answers, this row's first: ValueError: no"),
    ],
)
def test_what_a_function_does_wrong_stops_the_run(folder: Path, name: str, words: str) -> None:
    with pytest.raises(RewardError, match=re.escape(words)):
        named(folder, name)(answers(["a", "b"]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two", "stage.rewards.0.path: own.py:two takes (prompt, completion); a reward is a function"),
        ("Reward", "own.py:Reward is the class Reward; a reward is a function"),
        ("value", "own.py:value is a value (int)"),
        ("rewards", "own.py has no rewards; did you mean reward"),
    ],
)
def test_what_is_no_reward_is_refused_at_start(folder: Path, name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        named(folder, name)


def test_the_cause_is_kept(folder: Path) -> None:
    with pytest.raises(RewardError) as raised:
        named(folder, "raises")(answers(["a"]))
    assert isinstance(raised.value.__cause__, KeyError)


def test_the_functions_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    blocks = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if "def " in block
    ]
    (tmp_path / "own.py").write_text("\n".join(blocks))
    both = [FunctionRewardSpec(path=f"own.py:{name}", name=name) for name in ("politeness", "shortest")]
    found = built(*both, beside=tmp_path)(answers(["Please, no", "No"]))
    np.testing.assert_array_equal(found, np.float32([[1, 0], [0, 1]]))


# --------------------------------------------------------------------------------------------------
# Libraries

reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="pip install 'luthier[rl-verifiers]'"
)
math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="pip install 'luthier[rl-verifiers]'"
)


def gym_rows(task: str, size: int = 3) -> list[dict[str, Any]]:
    import reasoning_gym

    return [dict(entry) for entry in reasoning_gym.create_dataset(task, size=size, seed=1)]


@reasoning_gym
@pytest.mark.parametrize("task", ["basic_arithmetic", "leg_counting", "countdown", "word_sorting", "sudoku"])
def test_reasoning_gym_judges_its_own_rows(task: str, tmp_path: Path) -> None:
    """Its own answers are right; the rows survive a JSON file, with metadata as a tree or as text."""
    import reasoning_gym

    data = reasoning_gym.create_dataset(task, size=3, seed=1)
    rewards = built(ReasoningGymSpec(), ReasoningGymSpec(task=task))
    for number, entry in enumerate(data):
        row = json.loads(json.dumps(entry))
        for form in (row, {**row, "metadata": json.dumps(row["metadata"])}):
            asked = prompt(entry["question"], number, **form)
            rewards.require([asked])
            right = entry["answer"]
            texts = [f" {right}\n", f"Let me see: 3? <answer> {right} </answer>", "certainly wrong", ""]
            found = rewards([completion(text, asked) for text in texts])
            expected = [1.0, 1.0, *(data.score_answer(text, entry) for text in texts[2:])]
            np.testing.assert_allclose(found, np.float32([expected, expected]).T)
            assert expected[2] < 1


@reasoning_gym
def test_rows_that_reasoning_gym_did_not_make() -> None:
    rewards = built(ReasoningGymSpec())
    cases = [
        ({}, "no metadata of reasoning-gym"),
        ({"metadata": "{"}, "its metadata is no JSON"),
        ({"metadata": {"source_dataset": "nothing"}}, "reasoning-gym has no task 'nothing'"),
        ({"metadata": {"source_dataset": "leg_counting"}}, "the row has no `answer`"),
    ]
    for row, words in cases:
        with pytest.raises(RewardError, match=f"reward reasoning_gym: sums, row 4: .*{re.escape(words)}"):
            rewards.require([prompt(index=4, **row)])
    with pytest.raises(RecipeError, match="no task 'leg_countin'; did you mean leg_counting"):
        built(ReasoningGymSpec(task="leg_countin"))


@reasoning_gym
def test_a_verifier_that_fails_names_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.rewards.verifiers import ReasoningGym

    row = gym_rows("leg_counting", 1)[0]
    judge = ReasoningGym(ReasoningGymSpec(), "gym", "stage.rewards.0")
    for said, words in ((float("nan"), "says nan"), (None, "says None")):
        judge._verifiers["leg_counting"] = lambda answer, entry, said=said: said  # type: ignore[misc]
        with pytest.raises(RewardError, match=f"row 2: the verifier of leg_counting {words}"):
            judge([completion("4", prompt(index=2, **row))])
    judge._verifiers["leg_counting"] = lambda answer, entry: 1 / 0
    with pytest.raises(RewardError, match="leg_counting failed on '4': ZeroDivisionError"):
        judge([completion("4", prompt(index=2, **row))])


@math_verify
def test_math_verify() -> None:
    assert scores(
        MathVerifySpec(), [r"so $\frac12$", r"\boxed{0.5}", "1/2", r"$\frac13$", "no", ""], "1/2"
    ) == [1, 1, 1, 0, 0, 0]
    assert scores(MathVerifySpec(), ["$x^2 + 2x + 1$", "$(x+1)^2$", "$1$"], "(x+1)^2") == [1, 1, 0]
    # Without LaTeX's marks the library alone would take the last number of this for the answer.
    assert scores(MathVerifySpec(), ["$2x+3$", "$2$", "$3$"], "2x+3") == [1, 0, 0]
    assert scores(MathVerifySpec(), [r"$\{2, 1\}$"], r"so $\{1,2\}$") == [1]
    with pytest.raises(RewardError, match="math-verify cannot read the row's answer"):
        built(MathVerifySpec()).require([prompt(label="$ $")])


@math_verify
def test_math_verify_in_a_thread() -> None:
    """Its limit of time is a signal, which other threads may not ask for."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(scores(MathVerifySpec(), ["$0.5$", "$1$"], "1/2")))
    thread.start()
    thread.join()
    assert found == [[1, 0]]


@pytest.mark.parametrize(
    ("spec", "package"), [(ReasoningGymSpec(), "reasoning-gym"), (MathVerifySpec(), "math-verify")]
)
def test_a_missing_library_says_what_installs_it(
    spec: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier import environment

    monkeypatch.setattr(environment.util, "find_spec", lambda name: None)
    words = f"stage.rewards.0: type={spec.type} needs the package {package}, which is not installed: pip install 'luthier[rl-verifiers]'"
    with pytest.raises(RecipeError, match=re.escape(words)):
        built(spec)


def test_completions_are_what_a_rollout_has() -> None:
    one = completion("abc")
    assert isinstance(one, Completion) and len(one) == 4 and one.prompt.place == "sums, row 0"
