"""Metrics of an evaluation: what they are given, what becomes of their numbers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.collate import flat_batch
from luthier.model import kernel, logprobs
from luthier.model.logprobs import ModelPolicy
from luthier.trainer.metrics import Metric, accuracy, load_metrics
from luthier.types import EvalRow, RecipeError, Sample
from tests.reference import assert_same_gradients, flat_and_dense, gradients, without_dropout
from tests.tiny import random_samples, tiny_model
from tests.training import recipe_of, trainer_of

SETS = {"long": random_samples([40, 33, 25], seed=1), "short": random_samples([5, 3, 9, 4], seed=2)}

# What version 0.9.5 of LLaMA-Factory's `ComputeAccuracy` said of these predictions and labels.
# fmt: off
LABELS = [[3, 2, 2, 3, -100, -100, -100, 0, -100], [-100, -100, 3, -100, -100, 1, 3, 0, 3],
          [0, -100, 3, 1, 1, -100, 2, -100, -100], [-100, -100, 2, -100, 2, 2, 3, 3, 3],
          [-100, 2, -100, 3, -100, 0, -100, 0, -100], [2, 0, -100, 1, 0, 0, 2, -100, -100]]
PREDICTED = [[3, 3, 0, 2, 0, 0, 1, 3, 3], [2, 2, 2, 0, 1, 3, 1, 0, 0], [2, 0, 3, 3, 2, 1, 3, 2, 1],
             [1, 1, 3, 0, 0, 2, 1, 3, 0], [3, 0, 1, 3, 0, 2, 2, 1, 0], [2, 1, 3, 2, 1, 0, 2, 1, 2]]
# fmt: on
LLAMAFACTORY_ACCURACY = 0.1361111111111111


def row(targets: Sequence[int], predictions: Sequence[int]) -> EvalRow:
    count = len(targets)
    return EvalRow(
        "made",
        0,
        np.array(targets, np.int64),
        np.array(predictions, np.int64),
        np.zeros(count, np.float32),
        np.ones(count, np.float32),
    )


def test_accuracy_is_llamafactory_s() -> None:
    rows = []
    for labels, predicted in zip(LABELS, PREDICTED, strict=True):
        pairs = [(t, p) for t, p in zip(labels[1:], predicted[:-1], strict=True) if t != -100]
        rows.append(row(*zip(*pairs, strict=True)))
    assert accuracy(rows) == pytest.approx(LLAMAFACTORY_ACCURACY, rel=1e-12)
    of_all_tokens = np.mean([hit for one in rows for hit in one.targets == one.predictions])
    assert abs(of_all_tokens - LLAMAFACTORY_ACCURACY) > 0.005, "the mean over samples is another number"


def dense_row(model: Any, sample: Sample) -> tuple[list[int], list[int], torch.Tensor, list[float]]:
    """Targets, most likely tokens, log-probabilities and weights of one sample, by whole logits."""
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0].float()
    kept = [place for place in range(1, len(ids)) if sample.weights[place] > 0]
    before = [place - 1 for place in kept]
    said = logits.log_softmax(-1)[before, ids[kept]]
    return (
        ids[kept].tolist(),
        logits[before].argmax(-1).tolist(),
        said,
        sample.weights[kept].tolist(),
    )


@pytest.mark.parametrize("tokens_per_pass", [1, 60, 1000])
@pytest.mark.parametrize("family", ["llama", "gemma2-softcap", "cohere-scaled"])
def test_rows_are_those_of_whole_logits(
    family: str, tokens_per_pass: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sample once, whatever shares its pass, in chunks of 16 positions."""
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", 1)
    samples = random_samples([40, 33, 5, 1, 25, 2], seed=3)
    seen: list[EvalRow] = []

    def look(rows: Sequence[EvalRow]) -> float:
        seen.extend(rows)
        return 1.0

    recipe = recipe_of(tmp_path, train={"tokens_per_pass": tokens_per_pass}, method={"type": "full"})
    trainer = trainer_of(
        recipe, tiny_model(family), random_samples([8, 8]), {"made": samples}, [Metric("look", look)]
    )
    assert trainer.evaluate()["eval_look"] == 1.0
    supervised = [sample for sample in samples if (sample.weights[1:] > 0).any()]
    assert sorted(one.index for one in seen) == [sample.index for sample in supervised]
    assert len(supervised) < len(samples), "one sample has nothing to be asked for"
    dense = tiny_model(family, "eager").eval()
    for one in seen:
        targets, predictions, said, weights = dense_row(dense, samples[one.index])
        assert one.source == "random"
        assert one.targets.tolist() == targets
        assert one.predictions.tolist() == predictions
        assert one.weights.tolist() == weights
        torch.testing.assert_close(torch.from_numpy(one.logprobs), said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["frozen-head", "full"])
def test_asking_for_predictions_changes_no_gradient(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", 1)
    samples, found, predicted = random_samples([40, 33]), [], []
    for wanted in (False, True):
        model = without_dropout(flat_and_dense("llama", method)[0])
        answers = ModelPolicy(model).logprobs(flat_batch(samples), entropy=True, predictions=wanted)
        (answers.logprobs.sum() + answers.entropy.square().sum()).backward()
        found.append(gradients(model))
        predicted.append(answers.predictions)
    assert predicted[0] is None and predicted[1].dtype == torch.int64
    assert_same_gradients(found[1], found[0])


def evaluated(tmp_path: Path, sets: Mapping[str, Sequence[Sample]], *metrics: Metric) -> dict[str, float]:
    recipe = recipe_of(tmp_path, method={"type": "full"})
    return trainer_of(recipe, tiny_model("llama"), random_samples([8, 8]), sets, metrics).evaluate()


def test_several_sets_have_their_own_and_all_rows_count_the_same(tmp_path: Path) -> None:
    def longest(rows: Sequence[EvalRow]) -> dict[str, float]:
        return {"rows": len(rows), "longest": max(len(one.targets) for one in rows)}

    numbers = evaluated(tmp_path, SETS, Metric("accuracy", accuracy), Metric("unused", longest))
    dense = tiny_model("llama", "eager").eval()
    shares: dict[str, list[float]] = {}
    for name, samples in SETS.items():
        for sample in samples:
            targets, predictions, _, _ = dense_row(dense, sample)
            if targets:
                shares.setdefault(name, []).append(float(np.mean(np.array(targets) == predictions)))
        assert numbers[f"eval_{name}_accuracy"] == pytest.approx(np.mean(shares[name]), rel=1e-12)
        assert numbers[f"eval_{name}_rows"] == len(shares[name])
    pooled = [*shares["long"], *shares["short"]]
    assert numbers["eval_accuracy"] == pytest.approx(np.mean(pooled), rel=1e-12)
    assert numbers["eval_rows"] == len(pooled)
    assert numbers["eval_longest"] == numbers["eval_long_longest"] > numbers["eval_short_longest"]
    assert not any("unused" in name for name in numbers)


def test_a_set_without_targets_has_no_metric(tmp_path: Path) -> None:
    silent = [Sample(sample.input_ids, sample.weights * 0, "silent", 0) for sample in SETS["long"]]
    numbers = evaluated(tmp_path, {"silent": silent, "short": SETS["short"]}, Metric("accuracy", accuracy))
    assert "eval_silent_accuracy" not in numbers and "eval_silent_loss" in numbers
    assert numbers["eval_accuracy"] == numbers["eval_short_accuracy"]


@pytest.mark.parametrize(
    "answer", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), 0.5, {"mine": np.float64(0.5)}], ids=repr
)
def test_numbers_of_many_kinds(answer: Any, tmp_path: Path) -> None:
    assert evaluated(tmp_path, SETS, Metric("mine", lambda rows: answer))["eval_mine"] == 0.5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("high", "train.metrics: mine gave 'mine': 'high'; a metric gives a number, or numbers by name"),
        (None, "train.metrics: mine gave 'mine': None; a metric gives a number, or numbers by name"),
        ([0.5], "train.metrics: mine gave 'mine': [0.5]; a metric gives a number, or numbers by name"),
        ({1: 0.5}, "train.metrics: mine gave 1: 0.5; a metric gives a number, or numbers by name"),
        ({"loss": 0.5}, "train.metrics: the name eval_loss is taken; let the metric report another"),
        ({"runtime": 1}, "train.metrics: the name eval_runtime is taken; let the metric report another"),
        ({"accuracy": 1}, "train.metrics: the name eval_accuracy is taken; let the metric report another"),
    ],
)
def test_refused_answers(answer: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        evaluated(
            tmp_path,
            {"short": SETS["short"]},
            Metric("accuracy", accuracy),
            Metric("mine", lambda rows: answer),
        )
    assert str(error.value) == message


def test_what_a_metric_raises_says_which_it_was(tmp_path: Path) -> None:
    def mine(rows: Sequence[EvalRow]) -> float:
        raise ZeroDivisionError("no rows of that kind")

    with pytest.raises(ZeroDivisionError, match="no rows of that kind") as error:
        evaluated(tmp_path, {"short": SETS["short"]}, Metric("mine", mine))
    assert error.value.__notes__ == ["in the metric mine of train.metrics, over 4 rows of eval"]


def written(folder: Path) -> Path:
    file = folder / "mine.py"
    file.write_text(
        "half = 0.5\nclass Metric:\n    pass\ndef share(rows):\n    return len(rows)\naccuracy = share\n"
    )
    return file


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["accuracies"],
            "train.metrics: 'accuracies' is no metric; did you mean accuracy? choose from accuracy, or name a function "
            "of yours as package.module:Name or file.py:Name",
        ),
        (
            ["{}:half"],
            "train.metrics: {}:half is a value (float); a metric is a function of the evaluated rows",
        ),
        (
            ["{}:Metric"],
            "train.metrics: {}:Metric is the class Metric; a metric is a function of the evaluated rows",
        ),
        (["{}:shore"], "train.metrics: {} has no shore; did you mean share?"),
        (["accuracy", "{}:accuracy"], "train.metrics: two metrics are called accuracy; rename one"),
    ],
)
def test_refused_references(names: list[str], message: str, tmp_path: Path) -> None:
    file = written(tmp_path)
    with pytest.raises(RecipeError) as error:
        load_metrics([name.format(file) for name in names], None)
    assert str(error.value).startswith(message.format(file))


def test_named_functions(tmp_path: Path) -> None:
    file = written(tmp_path)
    built_in, mine = load_metrics(["accuracy", f"{file}:share"], None)
    assert (built_in.name, mine.name) == ("accuracy", "share")
    assert mine.function([row([1], [1])]) == 1


def test_no_metric_asks_for_no_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most likely tokens cost a pass over the logits, so only a metric pays for them."""
    asked: list[bool] = []
    whole: Callable[..., Any] = logprobs.token_logprobs

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["predictions"])
        return whole(*args, **kwargs)

    monkeypatch.setattr(logprobs, "token_logprobs", spy)
    plain = evaluated(tmp_path, {"short": SETS["short"]})
    assert asked and not any(asked)
    asked.clear()
    measured = evaluated(tmp_path, {"short": SETS["short"]}, Metric("accuracy", accuracy))
    assert asked and all(asked)
    assert measured["eval_loss"] == plain["eval_loss"]
